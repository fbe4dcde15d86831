"""The index in state.json: which tensors a checkpoint holds and where their chunks are stored.

The format is described in docs/checkpoint-format.md. The index is not trusted: every entry is compared with the
manifest and with the headers of the tensor files before memory is allocated for it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, cover_problem
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.json_values import check_values, reject_duplicates
from titan_ckpt.format.manifest import STATE, Manifest
from titan_ckpt.format.safetensors_header import dtype_name, dtype_of
from titan_ckpt.messages import reason_of
from titan_ckpt.storage.base import Storage

_HASH = re.compile(r"[0-9a-f]{32}")
STATE_LIMIT = 1 << 32  # bytes: some ten million chunks


@dataclass(frozen=True, slots=True)
class Chunk:
    """A slice of a tensor, stored as one entry of one safetensors file.

    Attributes:
        file: The file, relative to the checkpoint.
        key: The name of the entry in that file.
        offsets: Start of the slice in the tensor.
        lengths: Shape of the slice.
        checksums: The XXH3-128 of each piece of its bytes.
    """

    file: str
    key: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    checksums: tuple[str, ...]

    @property
    def box(self) -> Box:
        """The slice as a box."""
        return Box(self.offsets, self.lengths)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Metadata of a tensor in a checkpoint, known without reading its data.

    Attributes:
        dtype: The dtype.
        shape: The global shape.
        chunks: The slices it was written in. They cover it, each element exactly once.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Content:
    """The content of state.json.

    Attributes:
        values: Everything that is not a tensor, by top-level entry, still encoded.
        tensors: The tensors by name.
        piece_bytes: The number of bytes per checksum of a chunk.
    """

    values: dict[str, Any]
    tensors: dict[str, TensorSpec]
    piece_bytes: int


def chunk_key(name: str, shape: tuple[int, ...], box: Box) -> str:
    """Return the key of a chunk: the tensor's name if the chunk is the full tensor, else the name and the offsets."""
    return name if box.lengths == shape else f"{name}@{','.join(map(str, box.offsets))}"


def content_text(values: Mapping[str, Any], tensors: Mapping[str, TensorSpec], piece_bytes: int) -> bytes:
    """Serialize state.json.

    Args:
        values: Everything that is not a tensor, encoded.
        tensors: The tensors by name.
        piece_bytes: The number of bytes per checksum.

    Returns:
        The content of the file.

    Raises:
        CheckpointError: If it would be longer than what is read.
    """
    described = {
        name: {
            "dtype": dtype_name(spec.dtype),
            "shape": spec.shape,
            "chunks": [
                {
                    "file": at.file,
                    "key": at.key,
                    "offsets": at.offsets,
                    "lengths": at.lengths,
                    "checksums": at.checksums,
                }
                for at in spec.chunks
            ],
        }
        for name, spec in tensors.items()
    }
    content = {"values": values, "piece_bytes": piece_bytes, "tensors": described}
    text = json.dumps(content, separators=(",", ":")).encode()
    if len(text) > STATE_LIMIT:
        raise CheckpointError(f"state.json would have {len(text)} bytes, its limit is {STATE_LIMIT}: save fewer chunks")
    return text


def read_content(text: bytes, manifest: Manifest) -> Content:
    """Parse state.json and check it against the manifest.

    Args:
        text: The content of the file; its checksum was verified.
        manifest: The checkpoint's manifest.

    Returns:
        The parsed content.

    Raises:
        CheckpointError: If it is invalid; the message names the tensor.
    """
    try:
        content = json.loads(text, object_pairs_hook=reject_duplicates)
        values, piece_bytes = content["values"], content["piece_bytes"]
        if not isinstance(values, dict) or type(piece_bytes) is not int or not 0 < piece_bytes <= 1 << 30:
            raise ValueError("invalid values or piece_bytes")
        check_values(values)
        if piece_bytes % 16:
            raise ValueError(f"piece_bytes is {piece_bytes}, not a multiple of 16: pieces would cut elements in two")
        tensors = {name: _spec(name, described) for name, described in content["tensors"].items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"state.json cannot be parsed ({reason_of(error)})") from error
    _check_files(tensors, manifest)
    return Content(values, tensors, piece_bytes)


def _spec(name: str, described: Any) -> TensorSpec:
    try:
        dtype, shape = dtype_of(described["dtype"]), _naturals(described["shape"])
        chunks = tuple(
            Chunk(at["file"], at["key"], _naturals(at["offsets"]), _naturals(at["lengths"]), _hashes(at["checksums"]))
            for at in described["chunks"]
        )
        if any(type(at.file) is not str or type(at.key) is not str for at in chunks):
            raise ValueError("the file or key of a chunk is not a string")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"state.json: invalid entry for tensor {name!r} ({reason_of(error)})") from error
    problem = cover_problem(shape, [chunk.box for chunk in chunks])
    if problem is not None:
        raise CheckpointError(f"state.json: tensor {name!r} {problem}")
    return TensorSpec(dtype, shape, chunks)


def _naturals(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{str(numbers)[:80]} is not a list of non-negative integers")
    return tuple(numbers)


def _hashes(texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, list):
        raise ValueError("the checksums of a chunk are not a list")
    for text in texts:
        if type(text) is not str or not _HASH.fullmatch(text):
            raise ValueError(f"invalid checksum {str(text)[:80]!r}: expected 32 hex digits")
    return tuple(texts)


def _check_files(tensors: Mapping[str, TensorSpec], manifest: Manifest) -> None:
    owners: dict[tuple[str, str], str] = {}
    for name, spec in tensors.items():
        for chunk in spec.chunks:
            if chunk.file not in manifest.files:
                raise CheckpointError(f"state.json refers to {chunk.file!r}, which the manifest does not list")
            other = owners.setdefault((chunk.file, chunk.key), name)
            if other is not name:
                raise CheckpointError(f"state.json: both {other!r} and {name!r} use {chunk.key!r} of {chunk.file}")
        at = [(chunk.file, chunk.key) for chunk in spec.chunks]
        if len(set(at)) != len(at):
            raise CheckpointError(f"state.json: tensor {name!r} uses one entry of a file twice")


def read_state(storage: Storage, name: str, manifest: Manifest) -> bytes:
    """Read state.json and verify its size and checksum.

    Args:
        storage: The directory of checkpoints.
        name: The checkpoint's name.
        manifest: The checkpoint's manifest.

    Returns:
        The content of the file.

    Raises:
        CheckpointError: If it is missing or differs from what the manifest says.
    """
    try:
        record = manifest.files[STATE]
        size = storage.size(f"{name}/{STATE}")
        if size != record.size:
            raise CheckpointError(f"{STATE} has {size} bytes instead of {record.size}")
        text = storage.read(f"{name}/{STATE}", most=STATE_LIMIT)
    except FileNotFoundError:
        raise CheckpointError(f"{STATE} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{STATE} cannot be read ({error})") from error
    if checksum(text) != record.checksum:
        raise CheckpointError(f"{STATE} does not match its checksum")
    return text
