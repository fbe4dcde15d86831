"""DCP's `.metadata`, a pickle, read without running it.

A pickle is a program that names classes and functions and calls them. Here it names in vain: each name that a real
`.metadata` needs (the list below) becomes an inert record that notes what it is given, and any other name ends the
reading. What comes out is then checked like any other foreign data.

Python's unpickler in Python is used, not the one in C: in Python 3.11 that one fills gigabytes of memory when
a hostile file stores an object under a large number. The price is time, three to four times as much.
"""

import io
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._assemble import check_cover
from titan_ckpt.convert._files import file_size
from titan_ckpt.convert.source import Spec
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import MOST_DIMENSIONS, Box
from titan_ckpt.format.dtypes import TYPE_NAMES
from titan_ckpt.format.safetensors_header import dtype_name

METADATA = ".metadata"
_LIMIT = 1 << 30  # bytes: some million pieces

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
    # Where the checkpoint was written, by which Python on which system.
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
}
_DTYPES = {dtype_name(dtype): dtype for dtype in [*TYPE_NAMES, torch.complex128]}


@dataclass(frozen=True)
class Place:
    """Where one entry lies: a file of the folder, and the bytes in it."""

    file: str
    start: int
    length: int


@dataclass
class DcpIndex:
    """What `.metadata` says, checked.

    Attributes:
        tensors: type and shape by DCP's flat name.
        pieces: the pieces of each tensor.
        places: where each piece lies, in the order of `pieces`.
        objects: where each entry lies that is no tensor.
        paths: the path through the nested state, where DCP kept it.
    """

    tensors: dict[str, Spec] = field(default_factory=dict)
    pieces: dict[str, list[Box]] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    objects: dict[str, Place] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)


class _Record:
    """What stands for an object of a class that is admitted: what it was made from, and nothing that acts."""

    kind = ""
    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_dcp_metadata(folder: Path) -> DcpIndex:
    """Read `.metadata`.

    Args:
        folder: a folder that DCP wrote.

    Returns:
        What it says.

    Raises:
        CheckpointError: when it is absent, damaged, names anything but what is admitted, or contradicts itself.
    """
    path = folder / METADATA
    file_size(path, _LIMIT)
    try:
        metadata = _unpickle(path.read_bytes())
        return _index_of(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} does not read ({error.strerror or error})") from error
    except Exception as error:  # a pickle that is no pickle makes the unpickler raise anything
        raise CheckpointError(f"{path} is refused: it is damaged ({type(error).__name__}: {error})") from error


def _unpickle(data: bytes) -> Any:
    # Fresh classes each time: a file can set attributes on what it is given, and no other file may see them.
    records: dict[tuple[str, str], Any] = {
        (module, name): type(name, (_Record,), {"kind": name, "__slots__": ()})
        for module, names in _RECORDS.items()
        for name in names
    }

    class Restricted(pickle._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name in _DTYPES:
                return _DTYPES[name]
            try:
                return records[module, name]
            except KeyError:
                raise CheckpointError(
                    f"it names {module}.{name}, which a checkpoint has no use for. Nothing was executed"
                ) from None

    return Restricted(io.BytesIO(data)).load()


def _index_of(metadata: Any) -> DcpIndex:
    said = _fields(metadata, "Metadata")
    named = _typed(said.get("state_dict_metadata"), dict, "the table of tensors")
    stored = _places(_typed(said.get("storage_data"), dict, "the table of places"))
    places_of = Counter(name for name, _ in stored)
    index = DcpIndex(paths=_paths(said.get("planner_data")))
    for name, entry in named.items():
        _typed(name, str, "a name")
        if isinstance(entry, _Record) and entry.kind == "BytesStorageMetadata":
            index.objects[name] = _place_of(stored, name, None)
            continue
        fields = _fields(entry, "TensorStorageMetadata")
        pieces = _pieces(name, fields.get("chunks"), places_of[name])
        index.tensors[name] = Spec(_dtype(fields.get("properties")), _size(fields.get("size")))
        check_cover(name, index.tensors[name].shape, pieces)
        index.pieces[name] = pieces
        index.places[name] = [_place_of(stored, name, piece.offsets) for piece in pieces]
    return index


def _places(stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for key, value in stored.items():
        where, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name = _typed(where.get("fqn"), str, "a name")
        offset = where.get("offset")
        key_of = (name, None if offset is None else _size(offset))
        if key_of in places:
            raise CheckpointError(f"{name} lies in two places")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{name} is compressed or otherwise transformed, which is not supported")
        file = _typed(info.get("relative_path"), str, "a file name")
        if not file or file != Path(file).name or file in (".", "..") or "\\" in file or "\0" in file:
            raise CheckpointError(f"{name} is said to lie in {file!r}, which is not a file of its folder")
        start, length = _count(info.get("offset")), _count(info.get("length"))
        places[key_of] = Place(file, start, length)
    return places


def _place_of(
    places: Mapping[tuple[str, tuple[int, ...] | None], Place], name: str, offsets: tuple[int, ...] | None
) -> Place:
    try:
        return places[name, offsets]
    except KeyError:
        raise CheckpointError(f"it does not say where {name} lies") from None


def _pieces(name: str, value: Any, most: int) -> list[Box]:
    listed = _typed(value, list, "a list of pieces")
    if len(listed) > most:
        # A list may be named a million times in a small file: what it is worth is bounded before it is gone through.
        raise CheckpointError(f"{name} has {len(listed)} pieces and {most} places where they lie")
    fields = [_fields(item, "ChunkStorageMetadata") for item in listed]
    return [Box(_size(piece.get("offsets")), _size(piece.get("sizes"))) for piece in fields]


def _paths(value: Any) -> dict[str, tuple[str, ...]]:
    """Take the planner's paths where they are what DCP's own planner keeps; other planners keep other things."""
    paths: dict[str, tuple[str, ...]] = {}
    for name, path in value.items() if isinstance(value, dict) else ():
        sound = isinstance(name, str) and isinstance(path, tuple) and 0 < len(path) <= 64
        if sound and all(type(part) in (str, int) for part in path):
            paths[name] = tuple(str(part) for part in path)
    return paths


def _dtype(properties: Any) -> torch.dtype:
    if not isinstance(properties, _Record) or properties.kind != "TensorProperties":
        raise CheckpointError("a tensor has no properties")
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("a tensor has no type")
    return dtype


def _size(value: Any) -> tuple[int, ...]:
    """Read a torch.Size: one argument, the tuple of its numbers."""
    if not isinstance(value, _Record) or value.kind != "Size" or len(value.args) != 1:
        raise CheckpointError("a shape is none")
    sizes = value.args[0]
    if type(sizes) is not tuple or len(sizes) > MOST_DIMENSIONS:
        raise CheckpointError("a shape is none")
    return tuple(_count(size) for size in sizes)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise CheckpointError(f"{str(value)[:40]!r} stands where a size or an offset is wanted")
    return value


def _fields(value: Any, kind: str) -> dict[str, Any]:
    if not isinstance(value, _Record) or value.kind != kind or not isinstance(value.state, dict):
        raise CheckpointError(f"there is no {kind} where one is wanted")
    return value.state


def _typed(value: Any, kind: Callable[..., Any], what: str) -> Any:
    if type(value) is not kind:
        raise CheckpointError(f"a {type(value).__name__} stands where {what} is wanted")
    return value
