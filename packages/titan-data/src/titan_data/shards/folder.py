"""One folder of token shards: its manifest, the files that it lists, and their arrays. Used by `TokenShards`."""

import os
from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.files.reading import reading
from titan_data.shards.digest import check_digest
from titan_data.shards.format import (
    HEADER_SIZE,
    OFFSETS,
    Header,
    Manifest,
    ShardEntry,
    read_manifest,
    shard_size,
    token_dtype,
)
from titan_data.shards.mmap import map_array
from titan_data.sources.base import Tokens

_SHOWN = 10


class ShardFolder:
    """The documents of one folder.

    Args:
        path: The folder.
        verify: Check the checksum of each shard when one of its documents is first read, and that of the offsets now.
        open_shards: Maximum number of shards that are kept mapped.

    Attributes:
        path: The folder.
        manifest: Its manifest.

    Raises:
        DataError: If the folder contains no finished token shards, or files of it are missing, truncated or corrupt.
    """

    def __init__(self, path: Path, *, verify: bool, open_shards: int) -> None:
        self.path = path
        self.manifest = manifest = read_manifest(path)
        self._shards = manifest.shards
        self._dtype = token_dtype(manifest.job.vocab_size)
        self._verify = verify
        self._max_open = open_shards
        check_sizes(path, manifest)
        if verify:
            _verify(path / OFFSETS, 0, manifest.offsets_sha256)
        self._first_tokens = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._first_documents = manifest.first_documents()
        self._offsets = map_array(path / OFFSETS, "<i8", manifest.documents + 1)
        self._open: dict[int, Tokens] = {}
        self._checked: set[int] = set()  # shards whose headers are known to be valid
        self._opening = Lock()  # several loaders may read one source, each in its own thread

    def lengths(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the numbers of tokens of several documents: int64 `[D]` for int64 `[D]`."""
        lengths: npt.NDArray[np.int64] = self._offsets[indices + 1] - self._offsets[indices]
        return lengths

    def document(self, index: int) -> Tokens:
        """Return the tokens of a document, in `range(manifest.documents)`."""
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
            while len(self._open) >= self._max_open:
                self._open.pop(next(iter(self._open)))  # arrays that are still in use keep their map alive
            self._open[number] = tokens
            return tokens


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Find missing and truncated files now rather than after days of training.

    Args:
        folder: A folder of token shards.
        manifest: Its manifest.

    Raises:
        DataError: If a file is missing or has another size; the message names the first ones.
    """
    dtype = token_dtype(manifest.job.vocab_size)
    expected = {shard.name: shard_size(shard.documents, shard.tokens, dtype) for shard in manifest.shards}
    expected[OFFSETS] = 8 * (manifest.documents + 1)
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in expected:
        by_folder[name.rpartition("/")[0]].append(name)
    wrong = []
    for inside, names in by_folder.items():
        sizes = _sizes_in(folder / inside)
        for name in names:
            if (size := sizes.get(name.rpartition("/")[2])) is None:
                wrong.append(f"{name} is missing")
            elif size != expected[name]:
                wrong.append(f"{name} has {size} bytes instead of {expected[name]}")
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(f"{folder} is corrupt:\n  " + "\n  ".join(wrong[:_SHOWN]) + more)


def _sizes_in(folder: Path) -> dict[str, int]:
    """Return the sizes of the files of a folder by name: one request for all of them where that is possible."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}
    except FileNotFoundError:
        return {}


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
