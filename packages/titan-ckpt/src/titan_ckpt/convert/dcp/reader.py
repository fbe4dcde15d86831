"""A directory of torch's distributed checkpoint (DCP), such as torchtitan's, as a source of tensors."""

import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._assemble import assemble
from titan_ckpt.convert._files import file_size
from titan_ckpt.convert._torch_load import load_entry
from titan_ckpt.convert.dcp.metadata import METADATA, DcpIndex, Location, read_dcp_metadata
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box
from titan_ckpt.format.json_values import encode, key_of


class DcpDirectory:
    """The content of a DCP directory.

    Names are paths joined with "/" where DCP kept the path of its flat names (`model.layers.0.w` may have been `model`
    and `layers.0.w`), and its flat names otherwise.

    Attributes:
        tensors: The tensors, in the order of `.metadata`.
        values: The entries that are JSON values, nested by their paths.
        left_out: The remaining entries, with the reason why each is left out.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a directory; no tensor is read.

        Args:
            directory: A directory with `.metadata`.

        Raises:
            CheckpointError: If `.metadata` is absent, corrupt or hostile, or files are missing or truncated.
        """
        self.directory = Path(directory)
        index = read_dcp_metadata(self.directory)
        paths = {flat: index.paths.get(flat, (flat,)) for flat in [*index.tensors, *index.objects]}
        try:
            names = {flat: key_of(tuple(str(part) for part in path)) for flat, path in paths.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory / METADATA} is refused: {error}") from error
        if len(set(names.values())) != len(names):
            raise CheckpointError(f"{self.directory / METADATA} is refused: it gives two entries the same path")
        self._check_files(
            [*(at for locations in index.locations.values() for at in locations), *index.objects.values()]
        )
        _check_lengths(index)
        self.tensors = {names[flat]: spec for flat, spec in index.tensors.items()}
        self._chunks = {names[flat]: chunks for flat, chunks in index.chunks.items()}
        self._locations = {names[flat]: locations for flat, locations in index.locations.items()}
        self.left_out: dict[str, str] = {}
        nested = _Level()
        for flat, location in index.objects.items():
            self._read_value(nested, names[flat], paths[flat], location)
        through = {paths[flat][:length] for flat in index.tensors for length in range(len(paths[flat]))}
        self.values: dict[str, Any] = nested.resolved((), through)

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        shape = self.tensors[name].shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor from the chunks that hold it."""
        chunks, locations, dtype = self._chunks[name], self._locations[name], self.tensors[name].dtype

        def read(which: int, part: Box) -> torch.Tensor:
            file = self.directory / locations[which].file
            chunk = self._load(locations[which], f"a chunk of {name} in {file}")
            kind = (chunk.dtype, tuple(chunk.shape)) if isinstance(chunk, torch.Tensor) else None
            if kind != (dtype, chunks[which].lengths):
                raise CheckpointError(f"{file}: expected a chunk of {name}, found something else")
            tensor: torch.Tensor = chunk[part.slices]
            return tensor

        return assemble(dtype, Box(tuple(offsets), tuple(sizes)), chunks, read)

    def _check_files(self, locations: Iterable[Location]) -> None:
        sizes: dict[str, int] = {}
        claimed = 0
        for location in locations:
            claimed += location.length
            path = self.directory / location.file
            if location.file not in sizes:
                sizes[location.file] = file_size(path)
            end = location.start + location.length
            if end > sizes[location.file]:
                raise CheckpointError(
                    f"{path} is truncated: it has {sizes[location.file]} bytes instead of {end} or more"
                )
        if claimed > sum(sizes.values()):
            raise CheckpointError(
                f"{self.directory / METADATA} is refused: its entries claim {claimed} bytes, the files have "
                f"{sum(sizes.values())}"
            )

    def _load(self, location: Location, what: str) -> Any:
        with (self.directory / location.file).open("rb") as file:
            file.seek(location.start)
            data = file.read(location.length)
        return load_entry(io.BytesIO(data), len(data), what)

    def _read_value(self, nested: "_Level", name: str, path: tuple[str | int, ...], location: Location) -> None:
        try:
            value = self._load(location, f"{name} in {self.directory / location.file}")
            encode(value, name)  # raises for anything that is not JSON
            nested.put(path, value)
        except CheckpointError as error:
            self.left_out[name] = str(error)


def _check_lengths(index: DcpIndex) -> None:
    """Check that each chunk can be in its place, before memory is allocated for it."""
    for name, spec in index.tensors.items():
        for chunk, location in zip(index.chunks[name], index.locations[name], strict=True):
            if chunk.volume * spec.dtype.itemsize > location.length:
                raise CheckpointError(
                    f"{METADATA} is refused: it says that {name} has a chunk of {list(chunk.lengths)} in "
                    f"{location.length} bytes of {location.file}"
                )


class _Level(dict[str | int, Any]):
    """One level of nesting while values are put together: a dict, or a list if DCP gave it positions as keys."""

    def put(self, path: tuple[str | int, ...], value: Any) -> None:
        """Put a value in its place, or refuse a path that another entry blocks."""
        level: Any = self
        for part in path[:-1]:
            level = level.setdefault(part, _Level()) if isinstance(level, _Level) else None
        if not isinstance(level, _Level) or path[-1] in level:
            raise CheckpointError(f"{'/'.join(map(str, path))} conflicts with another entry of the same path")
        level[path[-1]] = value

    def resolved(self, path: tuple[str | int, ...], through: Collection[tuple[str | int, ...]]) -> Any:
        """Return it as dicts and lists.

        Args:
            path: Where it is.
            through: The paths that lead to tensors. A list there stays a dict: tensors are named by the keys of dicts.
        """
        items = {
            key: value.resolved((*path, key), through) if isinstance(value, _Level) else value
            for key, value in self.items()
        }
        if path and items and path not in through and all(key in items for key in range(len(items))):
            return [items[key] for key in range(len(items))]
        return {str(key): value for key, value in items.items()}


def put(nested: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Put a value into nested dicts.

    Args:
        nested: The outermost dict.
        path: The keys that lead to the value.
        value: The value.

    Raises:
        CheckpointError: If another value is in the way.
    """
    at: Any = nested
    for part in path[:-1]:
        at = at.setdefault(part, {}) if isinstance(at, dict) else None
    if not isinstance(at, dict) or path[-1] in at:
        raise CheckpointError(f"{key_of(path)} conflicts with another entry of the same path")
    at[path[-1]] = value
