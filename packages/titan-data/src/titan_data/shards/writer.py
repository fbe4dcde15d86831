"""Writing token shards: each file is written under a temporary name and renamed when it is complete."""

import contextlib
import errno
import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.shards.format import (
    HEADER_SIZE,
    MANIFEST,
    OFFSETS,
    Header,
    Job,
    Manifest,
    ShardEntry,
    offsets_start,
    shard_name,
    token_dtype,
)
from titan_data.shards.mmap import map_array

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYNC_BYTES = 16 << 20  # synced to the disk at a time: syncing a complete shard at once would make workers wait
STAGING = ".part"  # suffix of unfinished files


class ShardWriter:
    """Writes one shard.

    Args:
        folder: The folder of the shard.
        number: Number of the shard.
        first_document: Number of its first document in the folder.
        job: What it is made from.
    """

    def __init__(self, folder: Path, number: int, first_document: int, job: Job) -> None:
        self._path = folder / shard_name(number)
        self._job = job
        self._first_document = first_document
        self._dtype = token_dtype(job.vocab_size)
        self._offsets = array("q", [0])
        self._sha = hashlib.sha256()
        self._unsynced = 0
        with explain_full_disk(folder):
            self._file = _staging(self._path).open("wb")
            self._file.write(bytes(HEADER_SIZE))  # reserved; the header is written last

    @property
    def documents(self) -> int:
        """Number of documents so far."""
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return self._offsets[-1]

    def room_for(self, lengths: npt.NDArray[np.int64]) -> int:
        """Count how many of the next documents belong in this shard: those that fit, or one larger than a shard.

        Args:
            lengths: int64 `[D]`, tokens of the next documents.

        Returns:
            Their number. It depends on the documents alone, not on how many of them are passed at once.
        """
        fitting = int(np.searchsorted(self.tokens + np.cumsum(lengths), self._job.shard_tokens, side="right"))
        return fitting if self.tokens > 0 else max(fitting, 1)

    def append(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        """Write documents.

        Args:
            tokens: `[T]`, the ids of all documents, of the shard's type.
            lengths: int64 `[D]`, tokens of each document.
        """
        assert tokens.dtype == self._dtype
        assert len(tokens) == int(lengths.sum())
        self._offsets.frombytes((self.tokens + np.cumsum(lengths, dtype=np.int64)).tobytes())
        self._write(np.ascontiguousarray(tokens).view(np.uint8).data)

    def publish(self, source_end: tuple[int, int]) -> Header:
        """Write the header and give the file its final name.

        Args:
            source_end: Where the next shard begins in the text source.

        Returns:
            The header.
        """
        written = HEADER_SIZE + self.tokens * self._dtype.itemsize
        self._write(bytes(offsets_start(self.tokens, self._dtype) - written))
        self._write(np.frombuffer(self._offsets, np.int64).astype("<i8").tobytes())
        header = Header(
            vocab_size=self._job.vocab_size,
            tokenizer=self._job.tokenizer,
            first_document=self._first_document,
            documents=self.documents,
            tokens=self.tokens,
            source_end=source_end,
            sha256=self._sha.hexdigest(),
        )
        with explain_full_disk(self._path.parent):
            self._file.seek(0)
            self._file.write(header.pack())
            _publish(self._file, self._path)
        return header

    def discard(self) -> None:
        """Delete what has been written."""
        with contextlib.suppress(OSError):
            self._file.close()
        _staging(self._path).unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        with explain_full_disk(self._path.parent):
            self._file.write(data)
            self._unsynced += len(data)
            if self._unsynced >= _SYNC_BYTES:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._unsynced = 0
        self._sha.update(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with _atomic_file(path) as file:
        file.write(data)


def write_manifest(folder: Path, job: Job, shards: Sequence[ShardEntry]) -> Manifest:
    """Finish a folder: write the offsets of all documents, then the manifest.

    Args:
        folder: The folder that the names of the shards are relative to.
        job: What they were made from.
        shards: The shards, in order.

    Returns:
        The manifest.
    """
    sha = hashlib.sha256()
    with _atomic_file(folder / OFFSETS) as file:
        for part in _all_offsets(folder, shards, token_dtype(job.vocab_size)):
            file.write(part)
            sha.update(part)
    manifest = Manifest(job, tuple(shards), sha.hexdigest())
    write_atomically(folder / MANIFEST, manifest.pack())
    return manifest


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn errors of writing into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DataError(
                f"no space left for {folder} ({error.strerror}): free some space and run the same command again; "
                "finished shards are kept"
            ) from None
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from None


def _all_offsets(folder: Path, shards: Sequence[ShardEntry], dtype: np.dtype[Any]) -> Iterator[bytes]:
    base = 0
    yield np.zeros(1, dtype="<i8").tobytes()
    for shard in shards:
        offsets = map_array(folder / shard.name, "<i8", shard.documents + 1, offsets_start(shard.tokens, dtype))
        yield (base + offsets[1:]).astype("<i8").tobytes()
        base += shard.tokens


def _staging(path: Path) -> Path:
    return path.with_name(path.name + STAGING)


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is complete."""
    with explain_full_disk(path.parent):
        try:
            with _staging(path).open("wb") as file:
                yield file
                _publish(file, path)
        except BaseException:
            _staging(path).unlink(missing_ok=True)
            raise


def _publish(file: BinaryIO, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    _staging(path).replace(path)
    if os.name == "nt":  # folders cannot be opened there
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name survives a power failure
    finally:
        os.close(folder)
