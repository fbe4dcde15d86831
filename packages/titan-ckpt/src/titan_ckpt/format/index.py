"""The index in state.json: which tensors a checkpoint holds and where their chunks lie; see docs/checkpoint-format.md.

It is read with distrust: whatever it says is compared with the manifest and with the files' own headers before memory
is taken for it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, flaw_in_cover
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.json_values import check_values, unique
from titan_ckpt.format.manifest import STATE, Manifest
from titan_ckpt.format.safetensors_header import dtype_name, dtype_of
from titan_ckpt.storage.base import Storage

_HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, an entry of one safetensors file.

    Attributes:
        file: the file, relative to the checkpoint.
        key: the entry's name in it.
        offsets: where the part begins in the tensor.
        lengths: its shape.
        checksums: the XXH3-128 of each of its pieces.
    """

    file: str
    key: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    checksums: tuple[str, ...]

    @property
    def box(self) -> Box:
        """The part as a box."""
        return Box(self.offsets, self.lengths)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without reading it.

    Attributes:
        dtype: its type.
        shape: its whole shape.
        chunks: the parts it was written in; they cover it, each element once.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Content:
    """What state.json says.

    Attributes:
        values: what is not a tensor, by top-level entry, still encoded.
        tensors: the tensors by name.
        piece_bytes: how many bytes each checksum of a chunk is of.
    """

    values: dict[str, Any]
    tensors: dict[str, TensorSpec]
    piece_bytes: int


def chunk_key(name: str, shape: tuple[int, ...], box: Box) -> str:
    """Return the name of a chunk's entry: the tensor's own when it is all of it, else with its offsets."""
    return name if box.lengths == shape else f"{name}@{','.join(map(str, box.offsets))}"


def content_text(values: Mapping[str, Any], tensors: Mapping[str, TensorSpec], piece_bytes: int) -> bytes:
    """Write state.json.

    Args:
        values: what is not a tensor, encoded.
        tensors: the tensors.
        piece_bytes: how many bytes each checksum is of.

    Returns:
        The file's content.
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
    return json.dumps(content, separators=(",", ":")).encode()


def read_content(text: bytes, manifest: Manifest) -> Content:
    """Read state.json and see that it makes sense together with the manifest.

    Args:
        text: the file's content, its checksum already compared.
        manifest: the checkpoint's.

    Returns:
        What it says.

    Raises:
        CheckpointError: when it does not; the message names the tensor.
    """
    try:
        content = json.loads(text, object_pairs_hook=unique)
        values, piece_bytes = content["values"], content["piece_bytes"]
        if not isinstance(values, dict) or type(piece_bytes) is not int or not 0 < piece_bytes <= 1 << 30:
            raise ValueError("values or piece_bytes is not what it should be")
        check_values(values)
        if piece_bytes % 16:
            raise ValueError("piece_bytes is no multiple of 16, so that pieces would cut elements")
        tensors = {name: _spec(name, described) for name, described in content["tensors"].items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"state.json does not read ({type(error).__name__}: {error})") from error
    _refuse_strange_files(tensors, manifest)
    return Content(values, tensors, piece_bytes)


def _spec(name: str, described: Any) -> TensorSpec:
    try:
        dtype, shape = dtype_of(described["dtype"]), _naturals(described["shape"])
        chunks = tuple(
            Chunk(at["file"], at["key"], _naturals(at["offsets"]), _naturals(at["lengths"]), _hashes(at["checksums"]))
            for at in described["chunks"]
        )
        if any(type(at.file) is not str or type(at.key) is not str for at in chunks):
            raise ValueError("a chunk's file or key is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"state.json says nonsense of the tensor {name!r} ({type(error).__name__}: {error})"
        ) from error
    flaw = flaw_in_cover(shape, [chunk.box for chunk in chunks])
    if flaw is not None:
        raise CheckpointError(f"the tensor {name!r} {flaw}")
    return TensorSpec(dtype, shape, chunks)


def _naturals(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{str(numbers)[:80]} is no list of natural numbers")
    return tuple(numbers)


def _hashes(texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, list) or any(type(text) is not str or not _HASH.fullmatch(text) for text in texts):
        raise ValueError("a checksum is none")
    return tuple(texts)


def _refuse_strange_files(tensors: Mapping[str, TensorSpec], manifest: Manifest) -> None:
    claimed: dict[tuple[str, str], str] = {}
    for name, spec in tensors.items():
        for chunk in spec.chunks:
            if chunk.file not in manifest.files:
                raise CheckpointError(f"state.json refers to {chunk.file!r}, which the manifest does not list")
            other = claimed.setdefault((chunk.file, chunk.key), name)
            if other is not name:
                raise CheckpointError(f"{chunk.key!r} in {chunk.file} is claimed by both {other!r} and {name!r}")
        at = [(chunk.file, chunk.key) for chunk in spec.chunks]
        if len(set(at)) != len(at):
            raise CheckpointError(f"the tensor {name!r} claims one entry of a file twice")


def read_state(storage: Storage, name: str, manifest: Manifest) -> bytes:
    """Read state.json and compare it with the manifest.

    Args:
        storage: the folder the checkpoint lies in.
        name: its name.
        manifest: its manifest.

    Returns:
        The file's content.

    Raises:
        CheckpointError: when it is missing, or not what the manifest says.
    """
    try:
        record = manifest.files[STATE]
        size = storage.size(f"{name}/{STATE}")
        if size != record.size:
            raise CheckpointError(f"{STATE} has {size} bytes instead of {record.size}")
        text = storage.read(f"{name}/{STATE}")
    except FileNotFoundError:
        raise CheckpointError(f"{STATE} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{STATE} does not read ({error})") from error
    if checksum(text) != record.checksum:
        raise CheckpointError(f"{STATE} does not match its checksum")
    return text
