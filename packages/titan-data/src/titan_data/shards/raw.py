"""`RawTokens`: files of token ids without an index, as nanoGPT and llm.c write them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

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
_NPY_MAGIC = b"\x93NUMPY"
# Files that would be read as ids: the first bytes of what somebody might name instead.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive (.npz?)",
    b"PAR1": "a Parquet file",
    b"MMIDIDX": "the index of a Megatron-LM dataset",
    b"TITANTOK": "a token shard of titan-data, to be opened with its folder",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b\x08\x00": "compressed with gzip",
    b"\x1f\x8b\x08\x08": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard",
}
_SCAN = 1 << 24  # tokens scanned at a time

_log = logging.getLogger(__name__)


class RawTokens:
    """Files of token ids as a `TokenSource`; documents end with an eos or begin with a bos.

    Opening scans the files once to find where documents end (about a second per GiB); then they are memory-mapped.
    Ids are little-endian. llm.c's files with a header, and .npy files, are recognized. (llm.c and modded-nanogpt write
    <|endoftext|> before each document: that is a `bos_id`.)

    Args:
        paths: The files, in order; documents do not continue from one into the next.
        dtype: Type of the ids: "uint16" or "uint32".
        eos_id: The id that ends each document and is part of it; None if no id does. Without eos and bos, each file is
            one document.
        bos_id: The id that begins each document and is part of it; None if no id does.
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
        eos_id: int | None = None,
        bos_id: int | None = None,
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
        if bos_id is not None:
            self._settings["bos_id"] = bos_id
        self._tokens = [_map_tokens(path, dtype) for path in self._paths]
        borders = [
            _find_borders(path, tokens, eos_id, bos_id, vocab_size)
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
    little_endian = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(12)
            if head.startswith(_NPY_MAGIC):
                return map_array(path, little_endian, *_read_npy_header(path, file, little_endian))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}, not a file of raw ids")
    itemsize = little_endian.itemsize
    start = np.frombuffer(head, dtype="<i4") if len(head) == 12 else np.empty(0, "<i4")
    if len(start) and size >= _HEADER_SIZE and int(start[0]) in {magic for magic, _ in _HEADERS}:
        header = _HEADERS.get((int(start[0]), int(start[1])))
        if header is None:
            raise DataError(f"{path} has llm.c's header of version {int(start[1])}, which titan-data does not know")
        if header != dtype:
            raise DataError(f"{path} contains {header} according to its header, not {dtype}")
        if size != _HEADER_SIZE + int(start[2]) * itemsize:
            raise DataError(
                f"{path} is truncated or corrupt: it should have {int(start[2])} tokens according to its header"
            )
        return map_array(path, little_endian, int(start[2]), _HEADER_SIZE)
    if size == 0 or size % itemsize:
        raise DataError(
            f"{path} does not consist of {dtype} ids: it has {size} bytes; is it of another dtype, or truncated?"
        )
    return map_array(path, little_endian, size // itemsize)


def _has_header(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(8)
    return len(head) == 8 and tuple(np.frombuffer(head, "<i4").tolist()) in _HEADERS


def _read_npy_header(path: Path, file: IO[bytes], dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the number of ids in a .npy file, and where they begin in bytes."""
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, found = read(file)
    except ValueError as error:
        raise DataError(f"{path} is a .npy file with a corrupt header: {error}") from None
    if found != dtype:
        raise DataError(f"{path} is a .npy file of {found.name}, not of {dtype.name} ids: set dtype to its type")
    if len(shape) != 1:
        raise DataError(f"{path} is a .npy file of an array {list(shape)}, not of one line of ids")
    return int(shape[0]), file.tell()


def _find_borders(
    path: Path, tokens: Tokens, eos_id: int | None, bos_id: int | None, vocab_size: int | None
) -> npt.NDArray[np.int64]:
    """Find where documents begin and end, int64 `[D + 1]`, and check the ids."""
    if bos_id is None and eos_id is not None and len(tokens) > 1 and tokens[0] == eos_id and tokens[-1] != eos_id:
        message = (
            f"{path} begins with id {eos_id} and does not end with it: there it begins documents, as in files of llm.c "
            f"and modded-nanogpt, instead of ending them; pass bos_id={eos_id} instead of eos_id"
        )
        if _has_header(path):
            raise DataError(message)
        _log.warning("%s", message)
    borders = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(tokens), _SCAN):
        part = tokens[start : start + _SCAN]
        if vocab_size is not None and (largest := int(part.max())) >= vocab_size:
            raise DataError(
                f"{path} contains id {largest}, but the vocabulary has {vocab_size} ids: "
                "is it of another dtype or tokenizer?"
            )
        if eos_id is not None:
            borders.append(np.flatnonzero(part == eos_id) + (start + 1))
        if bos_id is not None:
            borders.append(np.flatnonzero(part == bos_id) + start)
    return np.unique(np.concatenate([*borders, np.array([len(tokens)])]))


def _reopen(paths: list[Path], settings: dict[str, Any], name: str) -> RawTokens:
    return RawTokens(paths, **settings, name=name)
