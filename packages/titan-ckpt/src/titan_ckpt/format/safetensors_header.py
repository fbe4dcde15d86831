"""Headers of safetensors files: written before the data is there, and read as untrusted input.

Tensor data is streamed by `save.file_writer` and `load.reads`; nothing here holds data.
https://github.com/huggingface/safetensors describes the format.
"""

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import MOST_DIMENSIONS, MOST_ELEMENTS
from titan_ckpt.format.dtypes import TYPE_NAMES, TYPES
from titan_ckpt.format.json_values import is_unicode, reject_duplicates
from titan_ckpt.storage.base import SourceFile

_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in TYPE_NAMES}
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
_ALIGNMENT = 4096  # bytes: tensor data starts at a page boundary, so that direct I/O can write it


class Entry(NamedTuple):
    """One tensor of a safetensors file.

    Attributes:
        dtype: The dtype.
        shape: The shape.
        start: Position of its first byte in the file.
        nbytes: Number of bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def is_storable(dtype: torch.dtype) -> bool:
    """Return whether the safetensors format has a dtype."""
    return dtype in TYPE_NAMES


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """Undo `dtype_name`.

    Raises:
        ValueError: If it is not the name of a storable dtype.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"{name!r} is not a supported dtype")
    return _BY_NAME[name]


def make_header(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """Serialize the header of a file whose tensors are stored without gaps.

    Args:
        entries: Key, dtype and shape of each tensor in the order of its data, wider dtypes first.

    Returns:
        The first bytes of the file, padded so that the data starts at a multiple of 4,096.

    Raises:
        CheckpointError: If a key cannot be written as UTF-8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, dtype, shape in entries:
        if not is_unicode(key):
            raise CheckpointError(f"the name {key!r} cannot be written as UTF-8: rename it")
        stop = at + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "strict")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: torch.Tensor) -> Any:
    """Return a tensor's elements in row-major order as a byte buffer: its own memory if possible, else a copy."""
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy()


def read_header(source: SourceFile, name: str) -> dict[str, Entry]:
    """Read the header of a safetensors file.

    Args:
        source: The open file.
        name: Its name, for messages.

    Returns:
        Its tensors by key.

    Raises:
        CheckpointError: If it is invalid or does not fit the file's size.
    """
    try:
        return _entries(source)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{name} is not a valid safetensors file: its header {problem}") from error


def _entries(source: SourceFile) -> dict[str, Entry]:
    if source.size < 8:
        raise ValueError("is truncated")
    (length,) = struct.unpack("<Q", _read(source, 0, 8))
    if length > min(_HEADER_LIMIT, source.size - 8):
        raise ValueError(f"claims a length of {length} bytes in a file of {source.size} bytes")
    content = json.loads(_read(source, 8, length), object_pairs_hook=reject_duplicates)
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    content.pop("__metadata__", None)
    entries = {key: _entry(key, described, 8 + length) for key, described in content.items()}
    at = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != at:
            raise ValueError(
                f"places {key!r} at byte {entry.start} instead of {at}: entries must not overlap or leave gaps"
            )
        at += entry.nbytes
    if at != source.size:
        raise ValueError(f"describes {at} bytes in a file of {source.size} bytes")
    return entries


def _entry(key: str, described: Any, base: int) -> Entry:
    dtype = TYPES.get(described["dtype"])
    if dtype is None:
        raise ValueError(f"gives {key!r} the unknown dtype {described['dtype']!r}")
    shape, (start, stop) = described["shape"], described["data_offsets"]
    numbers = [*shape, start, stop]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"gives {key!r} a size that is not a non-negative integer")
    if len(shape) > MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise ValueError(f"gives {key!r} the impossible shape {str(shape)[:80]}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"stores {key!r} of shape {shape} in {stop - start} bytes")
    return Entry(dtype, tuple(shape), base + start, stop - start)


def _read(source: SourceFile, at: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.read_into(at, memoryview(buffer))
    return bytes(buffer)
