"""The records of files as a source, by index or as a stream. Made by `load_files`."""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

from titan_data.files.base import FileFormat
from titan_data.files.counts import RecordCounts
from titan_data.files.inputs import InputFiles
from titan_data.files.malformed import Findings, UnreadableFile
from titan_data.files.storage import DataFile
from titan_data.fingerprint import Fingerprint

_THREADS = 16  # files indexed concurrently


class _OfFiles:
    """What both kinds of source know about their files."""

    def __init__(
        self, name: str, fingerprint: Fingerprint, findings: Findings, inputs: InputFiles, *, named: bool
    ) -> None:
        self.name = name
        self._fingerprint = fingerprint
        self._findings = findings
        self.inputs = inputs
        self.named = named  # see `identity_of`

    @property
    def malformed(self) -> int:
        """Number of malformed records met so far, each counted once."""
        return self._findings.malformed

    @property
    def unreadable(self) -> tuple[UnreadableFile, ...]:
        """The files found so far that cannot be read, or not to their ends, and how much is lost."""
        return self._findings.unreadable

    def fingerprint(self) -> Fingerprint:
        """Return the files' names and digests, as they were when the source was opened."""
        return self._fingerprint


class FileRecords(_OfFiles):
    """Records of files as a random-access source; made by `load_files`."""

    def __init__(
        self,
        name: str,
        fingerprint: Fingerprint,
        findings: Findings,
        files: Sequence[DataFile],
        reader: FileFormat,
        inputs: InputFiles,
        *,
        named: bool,
    ) -> None:
        super().__init__(name, fingerprint, findings, inputs, named=named)
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            self._indexed = list(pool.map(reader.index, files))
        self._ends = np.cumsum([len(records) for records in self._indexed], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self._indexed[file][index - (int(self._ends[file - 1]) if file else 0)]


class FileStream(_OfFiles):
    """Records of files as a stream; made by `load_files`. Shard s has files s, s + shards, s + 2 shards and so on."""

    def __init__(
        self,
        name: str,
        fingerprint: Fingerprint,
        findings: Findings,
        files: Sequence[DataFile],
        reader: FileFormat,
        inputs: InputFiles,
        shards: int,
        counts: RecordCounts,
        *,
        named: bool,
    ) -> None:
        super().__init__(name, fingerprint, findings, inputs, named=named)
        self.shards = shards
        self._files = files
        self._reader = reader
        self._counts = counts
        sizes = (sum(file.size or 0 for file in files[shard::shards]) for shard in range(shards))
        self._bytes_before = [0, *accumulate(sizes)]

    @property
    def bytes_total(self) -> int | None:
        """Bytes of all files; None if a server does not report a size."""
        sizes = [file.size for file in self._files]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    def bytes_before(self, shard: int) -> int:
        """Bytes of the files of all shards before one, in `range(shards + 1)`."""
        return self._bytes_before[shard]

    def bytes_read(self, shard: int) -> int:
        """Bytes that have been read, if the shards before `shard` are finished and it is being read."""
        return self._bytes_before[shard] + sum(file.progress.position for file in self._files[shard :: self.shards])

    def iterate(self, shard: int, start: int, /) -> Generator[str, None, None]:
        """Read a shard's texts from number `start` on; earlier ones are skipped without decoding."""
        for file in self._files[shard :: self.shards]:
            file.progress.position = 0
            count = self._counts.get(file)
            if count is None or count > start:
                read = yield from self._reader.stream(file, start)
                self._counts.put(file, read)
                count = read.records
            start = max(start - count, 0)
