"""Bare files of token ids, as nanoGPT and llm.c write them: a source without a manifest."""

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

# llm.c and modded-nanogpt put 256 32-bit integers in front: a magic number, a version and the number of tokens.
# Source: llm.c, dev/data/data_common.py.
_HEADERS: dict[tuple[int, int], RawType] = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
_HEADER_SIZE = 1024
_SCAN = 1 << 24  # tokens looked at at a time


class RawTokens:
    """Files of nothing but token ids as a `TokenSource`; documents end with an eos.

    Opening reads the files once, to find where documents end (about a second per GiB); then they are memory-mapped.
    Little-endian, as all machines in use write them. llm.c's files with a header are recognized.

    Args:
        paths: the files, in order; no document goes from one into the next.
        dtype: of the ids: "uint16" or "uint32".
        eos_id: the id that ends each document and is part of it; None if each file is one document.
        vocab_size: ids from here on are refused; None if it is not known.
        name: what to call the source; the first file's name if None.

    Raises:
        DataError: a file is missing, empty, of a broken length or of another type, or holds ids beyond the vocabulary.
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
            raise DataError(f'dtype is "uint16" or "uint32", not {dtype!r}')
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
        # Documents before each file; of document d of a file, its tokens are borders[d] to borders[d + 1].
        self._first_documents = np.cumsum([0, *(len(border) - 1 for border in borders)])
        self._borders = borders

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._paths, self._settings, self.name)

    def fingerprint(self) -> Fingerprint:
        """Name the files with their sizes and samples of their contents."""
        items = ((path.name, sample_digest(path)) for path in self._paths)
        return Fingerprint.of("raw tokens", items, self._settings)

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Numbers of tokens of some documents: int64 `[D]` for int64 `[D]`."""
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
            raise DataError(f"{path} says in its header that it holds {header}, not {dtype}")
        if size != _HEADER_SIZE + int(start[2]) * itemsize:
            raise DataError(f"{path} is cut off or damaged: its header promises {int(start[2])} tokens")
        return map_array(path, np.dtype(dtype).newbyteorder("<"), int(start[2]), _HEADER_SIZE)
    if size == 0 or size % itemsize:
        raise DataError(f"{path} is not made of {dtype} ids: it has {size} bytes; is it another dtype, or cut off?")
    return map_array(path, np.dtype(dtype).newbyteorder("<"), size // itemsize)


def _find_borders(path: Path, tokens: Tokens, eos_id: int | None, vocab_size: int | None) -> npt.NDArray[np.int64]:
    """Find where documents begin and end: int64 `[D + 1]`; look at the ids on the way."""
    ends = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(tokens), _SCAN):
        part = tokens[start : start + _SCAN]
        if vocab_size is not None and (largest := int(part.max())) >= vocab_size:
            raise DataError(
                f"{path} holds id {largest}, but the vocabulary has {vocab_size} ids: is it another dtype or tokenizer?"
            )
        if eos_id is not None:
            ends.append(np.flatnonzero(part == eos_id) + (start + 1))
    borders = np.concatenate(ends)
    return borders if borders[-1] == len(tokens) else np.append(borders, len(tokens))


def _reopen(paths: list[Path], settings: dict[str, Any], name: str) -> RawTokens:
    return RawTokens(paths, **settings, name=name)
