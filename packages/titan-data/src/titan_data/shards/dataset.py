"""`TokenShards`: token shards as a source, memory-mapped. Opening takes the same time for any size."""

import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.files.reading import reading
from titan_data.fingerprint import Fingerprint
from titan_data.shards.digest import check_digest
from titan_data.shards.format import HEADER_SIZE, OFFSETS, Header, ShardEntry, read_manifest, shard_size, token_dtype
from titan_data.shards.mmap import map_array
from titan_data.sources.base import Tokens

# Each open shard holds a file descriptor; a process often has no more than 1,024 (256 on macOS). Opening a shard again
# takes about 15 microseconds.
_OPEN_SHARDS = 128
_SHOWN = 10


class TokenShards:
    """The documents of a folder written by `titan-data prepare`, as a `TokenSource`.

    Opening reads the manifest and the sizes of the files; a shard is mapped when one of its documents is first read.

    Args:
        path: The folder.
        name: The source's name; the folder's name if None. A name that is given is part of the source's identity: it
            decides the order. Without one, the contents decide it, whatever the folder is called.
        verify: Check the checksum of each shard when one of its documents is first read, and that of the offsets when
            opening, at the cost of reading all of it once more. Without, sizes and headers are checked, and a token
            that has changed on the disk is not noticed: run `titan-data verify` after copying.

    Attributes:
        name: The source's name.
        tokenizer_fingerprint: Fingerprint of the tokenizer that made the tokens.
        vocab_size: The tokenizer's vocabulary size; every id is below it.
        bos_id: The first token of each document, or None.
        eos_id: The last token of each document, or None.
        pad_id: The tokenizer's padding id, or None.
        tokens: Number of tokens in all documents.

    Raises:
        DataError: If the folder contains no finished token shards, or files of it are missing, truncated or corrupt.
    """

    def __init__(self, path: str | Path, *, name: str | None = None, verify: bool = False) -> None:
        self.path = Path(path).expanduser()
        manifest = read_manifest(self.path)
        job = manifest.job
        self.name = name if name is not None else self.path.absolute().name
        self.named = name is not None  # see `identity_of`
        self.tokenizer_fingerprint: str | None = job.tokenizer
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = job.vocab_size, job.bos_id, job.eos_id, job.pad_id
        self.tokens = manifest.tokens
        self._shards = manifest.shards
        self._documents = manifest.documents
        self._dtype = token_dtype(job.vocab_size)
        self._verify = verify
        self._check_sizes()
        if verify:
            _verify(self.path / OFFSETS, 0, manifest.offsets_sha256)
        self._first_tokens = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._first_documents = [0, *accumulate(shard.documents for shard in self._shards)]
        self._offsets = map_array(self.path / OFFSETS, "<i8", self._documents + 1)
        self._open: dict[int, Tokens] = {}
        self._checked: set[int] = set()  # shards whose headers are known to be valid
        self._opening = Lock()  # several loaders may read one source, each in its own thread

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.name if self.named else None, self._verify)

    def fingerprint(self) -> Fingerprint:
        """Return the shards' names and checksums from the manifest."""
        return Fingerprint.of(
            "token shards",
            ((shard.name, shard.sha256[:16]) for shard in self._shards),
            {"tokenizer": self.tokenizer_fingerprint},
        )

    def __len__(self) -> int:
        return self._documents

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Return the numbers of tokens of several documents: int64 `[D]` for int64 `[D]`."""
        lengths: npt.NDArray[np.int64] = self._offsets[indices + 1] - self._offsets[indices]
        return lengths

    def __getitem__(self, index: int, /) -> Tokens:
        if not 0 <= index < self._documents:
            raise IndexError(f"document {index} of {self._documents}")
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        if start == stop:
            return np.empty(0, dtype=self._dtype)
        shard = bisect_right(self._first_tokens, start) - 1
        tokens = self._open.get(shard)
        if tokens is None:
            tokens = self._open_shard(shard)
        first = self._first_tokens[shard]
        document = tokens[start - first : stop - first]
        if len(document) != stop - start:
            raise DataError(f"{self.path / OFFSETS} is corrupt: document {index} would end beyond its shard")
        return document

    def _open_shard(self, number: int) -> Tokens:
        with self._opening:
            shard = self._shards[number]
            path = self.path / shard.name
            if number not in self._checked:
                check_header(path, shard, self._first_documents[number])
                if self._verify:
                    _verify(path, HEADER_SIZE, shard.sha256)
                self._checked.add(number)
            tokens = map_array(path, self._dtype, shard.tokens, HEADER_SIZE)
            while len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))  # arrays that are still in use keep their map alive
            self._open[number] = tokens
            return tokens

    def _check_sizes(self) -> None:
        """Find missing and truncated files now rather than after days of training."""
        with os.scandir(self.path) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        expected = {shard.name: shard_size(shard.documents, shard.tokens, self._dtype) for shard in self._shards}
        expected[OFFSETS] = 8 * (self._documents + 1)
        wrong = [
            f"{name} is missing" if name not in sizes else f"{name} has {sizes[name]} bytes instead of {size}"
            for name, size in expected.items()
            if sizes.get(name) != size
        ]
        if wrong:
            more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise DataError(f"{self.path} is corrupt:\n  " + "\n  ".join(wrong[:_SHOWN]) + more)


def check_header(path: Path, shard: ShardEntry, first_document: int) -> Header:
    """Read a shard's header and compare it with the manifest.

    Args:
        path: The shard's path.
        shard: Its entry in the manifest.
        first_document: The expected number of its first document.

    Returns:
        The header.

    Raises:
        DataError: If it cannot be read, is corrupt, or belongs to another folder or number.
    """
    try:
        with path.open("rb") as file:
            header = Header.unpack(file.read(HEADER_SIZE), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    found = (header.first_document, header.documents, header.tokens, header.sha256)
    if found != (first_document, shard.documents, shard.tokens, shard.sha256):
        raise DataError(
            f"{path} is not the shard that the manifest lists: it comes from another folder or has another number"
        )
    return header


def _verify(path: Path, start: int, sha256: str) -> None:
    with reading(str(path)):
        try:
            check_digest(path, start, sha256)
        except DataError as error:
            raise DataError(f"{path}: {error}; prepare or copy the file again") from None


def _reopen(path: Path, name: str | None, verify: bool) -> TokenShards:  # noqa: FBT001  # as pickle calls it
    return TokenShards(path, name=name, verify=verify)
