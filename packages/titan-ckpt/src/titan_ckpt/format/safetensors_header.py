"""Headers of safetensors files: written from what is known beforehand, and read with distrust.

The tensors' bytes are streamed past the header by those who write and read them, so nothing here holds data.
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
from titan_ckpt.format.json_values import is_unicode, unique
from titan_ckpt.storage.base import SourceFile

_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in TYPE_NAMES}
_HEADER_LIMIT = 100_000_000  # that of the safetensors library
_ALIGNMENT = 4096  # of the tensors' bytes: that of memory pages, so that they can go from memory to the disk directly


class Entry(NamedTuple):
    """One tensor of a safetensors file.

    Attributes:
        dtype: its type.
        shape: its shape.
        start: where its bytes begin, counted from the beginning of the file.
        nbytes: how many there are.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def is_storable(dtype: torch.dtype) -> bool:
    """Tell whether safetensors files have a word for a dtype."""
    return dtype in TYPE_NAMES


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """Undo `dtype_name`.

    Raises:
        ValueError: when no storable dtype is called so.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"{name!r} is no dtype")
    return _BY_NAME[name]


def make_header(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """Write the header of a file whose tensors follow one another without gaps.

    Args:
        entries: key, dtype and shape of each tensor in the order of its bytes, wider types first.

    Returns:
        The first bytes of the file, padded so that what follows begins at a multiple of 4,096.

    Raises:
        CheckpointError: when a key cannot be written as UTF-8.
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
    """Return a tensor's elements in row-major order as a buffer of bytes: its own memory where that is possible."""
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy()


def read_header(source: SourceFile, name: str) -> dict[str, Entry]:
    """Read the header of a safetensors file.

    Args:
        source: the open file.
        name: what to call it in messages.

    Returns:
        Its tensors by key.

    Raises:
        CheckpointError: when it is no header, or does not fit the file's size.
    """
    try:
        return _entries(source)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{name} is no sound safetensors file: its header {told}") from error


def _entries(source: SourceFile) -> dict[str, Entry]:
    if source.size < 8:
        raise ValueError("is cut short")
    (length,) = struct.unpack("<Q", _read(source, 0, 8))
    if length > min(_HEADER_LIMIT, source.size - 8):
        raise ValueError(f"says it has {length} bytes, in a file of {source.size}")
    content = json.loads(_read(source, 8, length), object_pairs_hook=unique)
    if not isinstance(content, dict):
        raise ValueError("is not an object")
    content.pop("__metadata__", None)
    entries = {key: _entry(key, described, 8 + length) for key, described in content.items()}
    at = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != at:
            raise ValueError(f"has {key!r} begin at byte {entry.start}, where {at} is next")
        at += entry.nbytes
    if at != source.size:
        raise ValueError(f"describes {at} bytes, in a file of {source.size}")
    return entries


def _entry(key: str, described: Any, base: int) -> Entry:
    dtype = TYPES.get(described["dtype"])
    if dtype is None:
        raise ValueError(f"has {key!r} of the unknown type {described['dtype']!r}")
    shape, (start, stop) = described["shape"], described["data_offsets"]
    numbers = [*shape, start, stop]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"has {key!r} with a size that is no natural number")
    if len(shape) > MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise ValueError(f"has {key!r} of the impossible shape {str(shape)[:80]}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"has {key!r} of shape {shape} in {stop - start} bytes")
    return Entry(dtype, tuple(shape), base + start, stop - start)


def _read(source: SourceFile, at: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.read_into(at, memoryview(buffer))
    return bytes(buffer)
