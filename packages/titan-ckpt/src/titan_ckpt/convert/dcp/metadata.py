"""DCP's `.metadata`, a pickle, read without executing it.

Each class that a real `.metadata` needs (the list below) is replaced by an inert record, see `_inert_pickle`. The
result is then checked like any other untrusted data.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._assemble import check_cover
from titan_ckpt.convert._files import file_size
from titan_ckpt.convert._inert_pickle import Record, load_inert, record_class
from titan_ckpt.convert.source import Spec
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import MOST_DIMENSIONS, Box
from titan_ckpt.format.dtypes import TYPE_NAMES
from titan_ckpt.format.safetensors_header import dtype_name

METADATA = ".metadata"
_LIMIT = 1 << 30  # bytes: some millions of chunks

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    # The path the checkpoint was written to; the class depends on the operating system and the version of Python.
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
}
_DTYPES = {dtype_name(dtype): dtype for dtype in [*TYPE_NAMES, torch.complex128]}


@dataclass(frozen=True)
class Location:
    """Where an entry is stored: a file of the directory, and a range of bytes in it."""

    file: str
    start: int
    length: int


@dataclass
class DcpIndex:
    """The content of `.metadata`, checked.

    Attributes:
        tensors: Dtype and shape by DCP's flat name.
        chunks: The chunks of each tensor.
        locations: Where each chunk is stored, in the order of `chunks`.
        objects: Where each entry that is not a tensor is stored.
        paths: The path through the nested state, where DCP kept it; a number is a position in a list.
    """

    tensors: dict[str, Spec] = field(default_factory=dict)
    chunks: dict[str, list[Box]] = field(default_factory=dict)
    locations: dict[str, list[Location]] = field(default_factory=dict)
    objects: dict[str, Location] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)


def read_dcp_metadata(directory: Path) -> DcpIndex:
    """Read `.metadata`.

    Args:
        directory: A directory that DCP wrote.

    Returns:
        Its content.

    Raises:
        CheckpointError: If it is absent, corrupt, names anything that is not allowed, or contradicts itself.
    """
    path = directory / METADATA
    file_size(path, _LIMIT)
    try:
        metadata = _unpickle(path.read_bytes())
        return _index_of(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # an invalid pickle can make the unpickler raise anything
        raise CheckpointError(f"{path} is refused: it is corrupt ({type(error).__name__}: {error})") from error


def _unpickle(data: bytes) -> Any:
    named: dict[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in _DTYPES.items()}
    named |= {(module, name): record_class(name) for module, names in _RECORDS.items() for name in names}
    return load_inert(data, named, "a checkpoint")


def _index_of(metadata: Any) -> DcpIndex:
    content = _fields(metadata, "Metadata")
    named = _typed(content.get("state_dict_metadata"), dict, "the dict of tensors")
    stored = _locations(_typed(content.get("storage_data"), dict, "the dict of locations"))
    stored_chunks = Counter(name for name, _ in stored)
    index = DcpIndex(paths=_paths(content.get("planner_data")))
    for name, entry in named.items():
        _typed(name, str, "a name")
        if isinstance(entry, Record) and entry.kind == "BytesStorageMetadata":
            index.objects[name] = _location_of(stored, name, None)
            continue
        fields = _fields(entry, "TensorStorageMetadata")
        chunks = _chunks(name, fields.get("chunks"), stored_chunks[name])
        index.tensors[name] = Spec(_dtype(fields.get("properties")), _size(fields.get("size")))
        check_cover(name, index.tensors[name].shape, chunks)
        index.chunks[name] = chunks
        index.locations[name] = [_location_of(stored, name, chunk.offsets) for chunk in chunks]
    return index


def _locations(stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Location]:
    locations: dict[tuple[str, tuple[int, ...] | None], Location] = {}
    for key, value in stored.items():
        entry, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name = _typed(entry.get("fqn"), str, "a name")
        offset = entry.get("offset")
        key_of = (name, None if offset is None else _size(offset))
        if key_of in locations:
            raise CheckpointError(f"{name} is stored in two places")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{name} is compressed or otherwise transformed, which is not supported")
        file = _typed(info.get("relative_path"), str, "a file name")
        if not file or file != Path(file).name or file in (".", "..") or "\\" in file or "\0" in file:
            raise CheckpointError(f"{name} refers to {file!r}, which is not a file of its directory")
        start, length = _count(info.get("offset")), _count(info.get("length"))
        locations[key_of] = Location(file, start, length)
    return locations


def _location_of(
    locations: Mapping[tuple[str, tuple[int, ...] | None], Location], name: str, offsets: tuple[int, ...] | None
) -> Location:
    try:
        return locations[name, offsets]
    except KeyError:
        raise CheckpointError(f"it does not say where {name} is stored") from None


def _chunks(name: str, value: Any, most: int) -> list[Box]:
    listed = _typed(value, list, "a list of chunks")
    if len(listed) > most:
        # A small file can refer to one list a million times, so the length is limited before the list is walked.
        raise CheckpointError(f"{name} has {len(listed)} chunks but only {most} of them are stored")
    fields = [_fields(item, "ChunkStorageMetadata") for item in listed]
    return [Box(_size(chunk.get("offsets")), _size(chunk.get("sizes"))) for chunk in fields]


def _paths(value: Any) -> dict[str, tuple[str | int, ...]]:
    """Return the planner's paths if they have the form that DCP's default planner stores."""
    paths: dict[str, tuple[str | int, ...]] = {}
    for name, path in value.items() if isinstance(value, dict) else ():
        valid = isinstance(name, str) and isinstance(path, tuple) and 0 < len(path) <= 64
        if valid and all(type(part) in (str, int) for part in path):
            paths[name] = path
    return paths


def _dtype(properties: Any) -> torch.dtype:
    if not isinstance(properties, Record) or properties.kind != "TensorProperties":
        raise CheckpointError("a tensor has no properties")
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("a tensor has no dtype")
    return dtype


def _size(value: Any) -> tuple[int, ...]:
    """Return the sizes of a torch.Size, whose one argument is the tuple of its sizes."""
    if not isinstance(value, Record) or value.kind != "Size" or len(value.args) != 1:
        raise CheckpointError(f"invalid shape: expected a torch.Size, found a {type(value).__name__}")
    sizes = value.args[0]
    if type(sizes) is not tuple or len(sizes) > MOST_DIMENSIONS:
        raise CheckpointError(f"invalid shape {str(sizes)[:80]}")
    return tuple(_count(size) for size in sizes)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise CheckpointError(f"expected a size or an offset, found {str(value)[:40]!r}")
    return value


def _fields(value: Any, kind: str) -> dict[str, Any]:
    if not isinstance(value, Record) or value.kind != kind or not isinstance(value.state, dict):
        raise CheckpointError(f"expected a {kind}, found a {type(value).__name__}")
    return value.state


def _typed(value: Any, kind: Callable[..., Any], what: str) -> Any:
    if type(value) is not kind:
        raise CheckpointError(f"expected {what}, found a {type(value).__name__}")
    return value
