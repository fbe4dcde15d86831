"""`MegatronTokens`: Megatron-LM's indexed datasets, a `.bin` file of ids and an `.idx` file of document offsets."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.fingerprint import Fingerprint
from titan_data.shards.digest import sample_digest
from titan_data.shards.mmap import map_array
from titan_data.sources.base import Tokens

# Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py: magic, version, code of the type, number of
# sequences, number of borders of documents (one more than documents); then lengths (int32), byte offsets (int64) of
# sequences, and borders (int64): the sequence that each document begins with.
_HEAD = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronTokens:
    """A Megatron-LM indexed dataset as a `TokenSource`; a document is all its sequences, concatenated.

    Args:
        path: Path of either file, or without their suffix.
        name: The source's name; the files' name if None.

    Raises:
        DataError: If a file is missing, truncated, of another version, or not of integers.
    """

    tokenizer_fingerprint: None = None

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        prefix = Path(path).expanduser()
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        self._bin, self._idx = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
        self.name = name if name is not None else prefix.name
        self._dtype, sequences, borders = _read_head(self._idx)
        self._lengths = map_array(self._idx, "<i4", sequences, _HEAD.size)
        self._starts = map_array(self._idx, "<i8", sequences, _HEAD.size + 4 * sequences)
        self._borders = map_array(self._idx, "<i8", borders, _HEAD.size + 12 * sequences)
        if (
            borders == 0
            or self._borders[0] != 0
            or self._borders[-1] != sequences
            or (np.diff(self._borders) < 0).any()
        ):
            raise DataError(f"{self._idx} is corrupt: its documents do not cover its {sequences} sequences")
        count = int((self._starts // self._dtype.itemsize + self._lengths).max(initial=0))
        self._tokens = map_array(self._bin, self._dtype, count)
        # Tokens before each sequence, for the lengths of documents; most datasets have one sequence per document.
        one_each = borders == sequences + 1 and bool((np.diff(self._borders) == 1).all())
        self._totals = None if one_each else np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._bin, self.name)

    def fingerprint(self) -> Fingerprint:
        """Return both files' names, with digests of their sizes and samples of their contents."""
        return Fingerprint.of("megatron tokens", ((path.name, sample_digest(path)) for path in (self._bin, self._idx)))

    def __len__(self) -> int:
        return len(self._borders) - 1

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Return the numbers of tokens of several documents: int64 `[D]` for int64 `[D]`."""
        if self._totals is None:
            return self._lengths[indices].astype(np.int64)
        lengths: npt.NDArray[np.int64] = self._totals[self._borders[indices + 1]] - self._totals[self._borders[indices]]
        return lengths

    def __getitem__(self, index: int, /) -> Tokens:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        sequences = slice(int(self._borders[index]), int(self._borders[index + 1]))
        starts = self._starts[sequences] // self._dtype.itemsize
        ends = starts + self._lengths[sequences]
        if len(starts) == 0:
            return np.empty(0, dtype=self._dtype)
        if np.array_equal(starts[1:], ends[:-1]):  # as Megatron's own tools write them
            return self._tokens[starts[0] : ends[-1]]
        return np.concatenate([self._tokens[start:end] for start, end in zip(starts, ends, strict=True)])


def _read_head(path: Path) -> tuple[np.dtype[Any], int, int]:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise DataError(f"{path} is not an index of a Megatron-LM dataset, or is truncated")
    _, version, code, sequences, borders = _HEAD.unpack(head)
    if version != 1:
        raise DataError(f"{path} has version {version}, but titan-data reads version 1")
    if code not in _TYPES:
        raise DataError(f"{path} has type {code}, which is not an integer type")
    return np.dtype(_TYPES[code]), sequences, borders


def _reopen(path: Path, name: str) -> MegatronTokens:
    return MegatronTokens(path, name=name)
