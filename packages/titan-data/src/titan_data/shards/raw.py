"""`RawTokens`: files of token ids without an index, as nanoGPT and llm.c write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.fingerprint import Fingerprint
from titan_data.shards.digest import sample_digest
from titan_data.shards.mmap import map_array
from titan_data.sources.base import Tokens

RawType = Literal["uint16", "uint32"]

# Files of llm.c and modded-nanogpt begin with 256 32-bit integers: a magic number, a version, the number of tokens.
# Source: llm.c, dev/data/data_common.py.
_HEADERS: dict[tuple[int, int], RawType] = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
_HEADER_SIZE = 1024
_SCAN = 1 << 24  # tokens scanned at a time


class RawTokens:
    """Files of token ids as a `TokenSource`; documents end with an eos.

    Opening scans the files once to find where documents end (about a second per GiB); then they are memory-mapped.
    Ids are little-endian. llm.c's files with a header are recognized.

    Args:
        paths: The files, in order; documents do not continue from one into the next.
        dtype: Type of the ids: "uint16" or "uint32".
        eos_id: The id that ends each document and is part of it; None if each file is one document.
        vocab_size: Vocabulary size, to check that all ids are below it; None if unknown.
        name: The source's name; the first file's name if None.

    Raises:
        DataError: If a file is missing, empty, truncated or of another type, or has ids outside the vocabulary.
    """

    tokenizer_fingerprint: None = None

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        dtype: RawType,
        eos_id: int | None,
        vocab_size: int | None = None,
        name: str | None = None,
    ) -> None:
        if dtype not in ("uint16", "uint32"):
            raise DataError(f'dtype must be "uint16" or "uint32", not {dtype!r}')
        paths = [paths] if isinstance(paths, str | Path) else paths
        if not paths:
            raise DataError("no files to read: give at least one")
        self._paths = [Path(path).expanduser() for path in paths]
        self._settings: dict[str, Any] = {"dtype": dtype, "eos_id": eos_id, "vocab_size": vocab_size}
        self._tokens = [_map_tokens(path, dtype) for path in self._paths]
        borders = [
            _find_borders(path, tokens, eos_id, vocab_size)
            for path, tokens in zip(self._paths, self._tokens, strict=True)
        ]
        self.name = name if name is not None else self._paths[0].name
        # Documents before each file. The tokens of document d of a file are borders[d] to borders[d + 1].
        self._first_documents = np.cumsum([0, *(len(border) - 1 for border in borders)])
        self._borders = borders

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._paths, self._settings, self.name)

    def fingerprint(self) -> Fingerprint:
        """Return the files' names, with digests of their sizes and samples of their contents."""
        items = ((path.name, sample_digest(path)) for path in self._paths)
        return Fingerprint.of("raw tokens", items, self._settings)

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Return the numbers of tokens of several documents: int64 `[D]` for int64 `[D]`."""
        files = np.searchsorted(self._first_documents, indices, side="right") - 1
        lengths = np.empty(len(indices), dtype=np.int64)
        for file in np.unique(files):
            here = files == file
            local = indices[here] - self._first_documents[file]
            lengths[here] = self._borders[file][local + 1] - self._borders[file][local]
        return lengths

    def __getitem__(self, index: int, /) -> Tokens:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        file = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        local = index - int(self._first_documents[file])
        start, stop = self._borders[file][local : local + 2]
        return self._tokens[file][start:stop]


def _map_tokens(path: Path, dtype: RawType) -> Tokens:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = np.frombuffer(file.read(12), dtype="<i4", count=-1 if size >= 12 else 0)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    itemsize = np.dtype(dtype).itemsize
    header = _HEADERS.get((int(start[0]), int(start[1]))) if len(start) == 3 else None
    if header is not None and size >= _HEADER_SIZE:
        if header != dtype:
            raise DataError(f"{path} contains {header} according to its header, not {dtype}")
        if size != _HEADER_SIZE + int(start[2]) * itemsize:
            raise DataError(
                f"{path} is truncated or corrupt: it should have {int(start[2])} tokens according to its header"
            )
        return map_array(path, np.dtype(dtype).newbyteorder("<"), int(start[2]), _HEADER_SIZE)
    if size == 0 or size % itemsize:
        raise DataError(
            f"{path} does not consist of {dtype} ids: it has {size} bytes; is it of another dtype, or truncated?"
        )
    return map_array(path, np.dtype(dtype).newbyteorder("<"), size // itemsize)


def _find_borders(path: Path, tokens: Tokens, eos_id: int | None, vocab_size: int | None) -> npt.NDArray[np.int64]:
    """Find where documents begin and end, int64 `[D + 1]`, and check the ids."""
    ends = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(tokens), _SCAN):
        part = tokens[start : start + _SCAN]
        if vocab_size is not None and (largest := int(part.max())) >= vocab_size:
            raise DataError(
                f"{path} contains id {largest}, but the vocabulary has {vocab_size} ids: "
                "is it of another dtype or tokenizer?"
            )
        if eos_id is not None:
            ends.append(np.flatnonzero(part == eos_id) + (start + 1))
    borders = np.concatenate(ends)
    return borders if borders[-1] == len(tokens) else np.append(borders, len(tokens))


def _reopen(paths: list[Path], settings: dict[str, Any], name: str) -> RawTokens:
    return RawTokens(paths, **settings, name=name)
