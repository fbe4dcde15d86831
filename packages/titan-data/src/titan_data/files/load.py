"""JSON lines, Parquet and plain text as sources: on this machine or wherever fsspec reaches."""

import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from titan_data.errors import DataError
from titan_data.files.base import FileFormat
from titan_data.files.compression import compression_of, require_compression
from titan_data.files.glob import find_files, source_name
from titan_data.files.jsonl import JsonLines
from titan_data.files.line_index import IndexFolder
from titan_data.files.lines import LineFormat
from titan_data.files.malformed import MalformedRecords, OnMalformed
from titan_data.files.parquet import Parquet
from titan_data.files.retry import Retry
from titan_data.files.storage import DataFile, digest_sample
from titan_data.files.whole_file import WholeFiles
from titan_data.fingerprint import Fingerprint

Format = Literal["jsonl", "parquet", "text"]
Unit = Literal["file", "line", "paragraph"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_THREADS = 16  # files looked at at a time


def load_files(
    patterns: str | Path | Sequence[str | Path],
    *,
    text_key: str = "text",
    format: Format | None = None,
    text_unit: Unit = "file",
    streaming: bool = False,
    shards: int = 32,
    on_malformed: OnMalformed = "skip",
    name: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    retry: Retry | None = None,
    index_folder: str | Path | None = None,
    cache_bytes: int = 256 << 20,
) -> "FileRows | FileStream":
    """Open files of text as a source: JSON lines, Parquet, or plain text, each of them plain, `.gz` or `.zst`.

    Without `streaming` the documents can be shuffled. That is for text files that are one document each, for
    uncompressed JSON lines and text on this machine (at the start they are read once to find where each record
    begins, unless `index_folder` has it: 8 bytes of memory per record) and for Parquet (each read decodes a whole row
    group, so shuffling is quick only as long as the decoded texts fit into `cache_bytes`). For all else, and for what
    is too large to be looked through at the start, there is `streaming`: the documents come in the order of their
    files, unshuffled; or prepare token shards.

    What cannot be used (broken JSON, no `text_key`, no text in it, invalid UTF-8) is an empty document, which a
    loader passes over: the other documents keep their places. Where a compressed file is damaged it ends, and
    where a Parquet row group is, the rest of its rows are empty.

    Args:
        patterns: paths, globs or URLs that fsspec knows (`s3://…`, `https://…`, `hf://…`); see the order below.
        text_key: key of the text in JSON lines, or its column in Parquet.
        format: "jsonl", "parquet" or "text"; by default told by the suffix of the files.
        text_unit: what one document of a text file is: the whole "file", each "line", or each "paragraph" (the lines
            between blank ones).
        streaming: read the documents as they come.
        shards: with streaming, the files are dealt to so many logical shards, or to one each where there are fewer
            files. A stream's order depends on it.
        on_malformed: "skip" to warn of malformed records, by file and line, and to count them; "raise" to stop.
        name: what to call the source; by default the end of the first pattern.
        storage_options: arguments of fsspec's file system, such as credentials.
        retry: how often to try again, and how long to wait, where the storage fails.
        index_folder: a folder to keep indices in, so that a later start need not look through the files again. A
            stream keeps the number of records there, and passes over whole files of .gz and .zst on resume.
        cache_bytes: decoded Parquet row groups kept in memory, in bytes.

    Returns:
        A random-access source, or a stream. Files come sorted by path, numbers in numerical order (part-2 before
        part-10), pattern by pattern. The fingerprint is made of their names, sizes and samples of their contents.

    Raises:
        DataError: a pattern finds nothing, files are of an unknown or of several formats, the first one has no
            `text_key`, records cannot be read in any order, or an extra is not installed.
    """
    retry = retry or Retry()
    files = find_files(patterns, options=storage_options, retry=retry)
    name = name or source_name(patterns if isinstance(patterns, str | Path) else patterns[0])
    malformed = MalformedRecords(name, on_malformed)
    folder = None if index_folder is None else IndexFolder(index_folder)
    format = format or _format_of(files)
    reader = _open_format(format, text_key, text_unit, malformed, retry, folder, cache_bytes)
    settings: dict[str, str | int | bool] = {"streaming": streaming}
    settings |= {"text_unit": text_unit} if format == "text" else {"text_key": text_key}
    digests = _look_at(files, reader, retry)
    if not streaming:
        fingerprint = Fingerprint.of(reader.kind, digests, settings)
        return FileRows(name, fingerprint, malformed, files, reader)
    if shards < 1:
        raise DataError(f"a stream needs at least 1 shard, not {shards}")
    settings["shards"] = shards = min(shards, len(files))
    return FileStream(name, Fingerprint.of(reader.kind, digests, settings), malformed, files, reader, shards)


class FileRows:
    """Records of files as a random-access source; made by `load_files`."""

    def __init__(
        self,
        name: str,
        fingerprint: Fingerprint,
        malformed: MalformedRecords,
        files: Sequence[DataFile],
        reader: FileFormat,
    ) -> None:
        self.name = name
        self._fingerprint = fingerprint
        self._malformed = malformed
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            self._rows = list(pool.map(reader.index, files))
        self._ends = np.cumsum([len(rows) for rows in self._rows], dtype=np.int64)

    @property
    def malformed(self) -> int:
        """Number of malformed records met so far, each counted once."""
        return self._malformed.count

    def fingerprint(self) -> Fingerprint:
        """Return the files' names and digests, as they were when the source was made."""
        return self._fingerprint

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self._rows[file][index - (int(self._ends[file - 1]) if file else 0)]


class FileStream:
    """Records of files as a stream; made by `load_files`. Shard s has the files s, s + shards, s + 2 shards, …"""

    def __init__(
        self,
        name: str,
        fingerprint: Fingerprint,
        malformed: MalformedRecords,
        files: Sequence[DataFile],
        reader: FileFormat,
        shards: int,
    ) -> None:
        self.name = name
        self.shards = shards
        self._fingerprint = fingerprint
        self._malformed = malformed
        self._files = files
        self._reader = reader
        self._counts: dict[int, int] = {}  # records of the files that were read to their ends

    @property
    def malformed(self) -> int:
        """Number of malformed records met so far, each counted once."""
        return self._malformed.count

    def fingerprint(self) -> Fingerprint:
        """Return the files' names and digests, as they were when the source was made."""
        return self._fingerprint

    def iterate(self, shard: int, start: int, /) -> Generator[str, None, None]:
        """Read a shard's texts from number `start` on; those before are passed over without being decoded."""
        for number in range(shard, len(self._files), self.shards):
            if (count := self._counts.get(number)) is None or count > start:
                count = yield from self._reader.stream(self._files[number], start)
                self._counts[number] = count
            start = max(start - count, 0)


def _format_of(files: Sequence[DataFile]) -> Format:
    """Tell the format by the suffixes; all files must be of one."""
    found: dict[Format, DataFile] = {}
    for file in files:
        path = file.name.partition(" (")[0].lower()
        if compression_of(path):
            path = path.rpartition(".")[0]
        if (format := _FORMATS.get(os.path.splitext(path)[1])) is None:
            raise DataError(
                f'{file.label}: what is in it cannot be told by its name; give format="jsonl", "parquet" or "text", '
                "or a pattern that leaves it out"
            )
        found.setdefault(format, file)
    if len(found) > 1:
        names = ", ".join(f"{file.label} ({format})" for format, file in found.items())
        raise DataError(f"the files are of several formats: {names}; open them as a source each, or give format=…")
    return next(iter(found))


def _open_format(
    format: Format,
    text_key: str,
    text_unit: Unit,
    malformed: MalformedRecords,
    retry: Retry,
    index_folder: IndexFolder | None,
    cache_bytes: int,
) -> FileFormat:
    if format == "jsonl":
        return JsonLines(text_key, malformed, retry, index_folder)
    if format == "parquet":
        return Parquet(text_key, malformed, retry, cache_bytes)
    if format != "text":
        raise DataError(f'format is "jsonl", "parquet" or "text", not {format!r}')
    if text_unit == "file":
        return WholeFiles(malformed, retry)
    if text_unit in ("line", "paragraph"):
        return LineFormat("text", text_unit, str, malformed, retry, index_folder)
    raise DataError(f'text_unit is "file", "line" or "paragraph", not {text_unit!r}')


def _look_at(files: Sequence[DataFile], reader: FileFormat, retry: Retry) -> list[tuple[str, str]]:
    """Make sure that the first file has what is to be read; give the names and digests of all."""
    for file in files:
        require_compression(compression_of(file.name))
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda file: digest_sample(file, retry), files))
    if (first := next((file for file in files if file.size != 0), None)) is not None:
        reader.check(first)
    return [(file.name, digest) for file, digest in zip(files, digests, strict=True)]
