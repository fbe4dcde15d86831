"""A folder of torch's distributed checkpoint (DCP), such as torchtitan's, as a source of tensors."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._assemble import assemble
from titan_ckpt.convert._files import file_size
from titan_ckpt.convert._torch_load import load_entry
from titan_ckpt.convert.dcp.metadata import METADATA, Place, read_dcp_metadata
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box
from titan_ckpt.format.json_values import encode, key_of


class DcpFolder:
    """The content of a DCP folder.

    Names are paths joined with "/" where DCP kept the path of its flat names (`model.layers.0.w` may have been
    `model` and `layers.0.w`), and its flat names otherwise.

    Attributes:
        tensors: the tensors, in the order of the record.
        values: the entries that are no tensors but JSON, by their paths, nested.
        left_out: the entries that are neither, with the reason.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder; no tensor is read.

        Args:
            folder: a folder with `.metadata`.

        Raises:
            CheckpointError: when the record is absent, damaged or hostile, or files are missing or too short.
        """
        self.folder = Path(folder)
        index = read_dcp_metadata(self.folder)
        paths = {flat: index.paths.get(flat, (flat,)) for flat in [*index.tensors, *index.objects]}
        try:
            names = {flat: key_of(path) for flat, path in paths.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder / METADATA} is refused: {error}") from error
        if len(set(names.values())) != len(names):
            raise CheckpointError(f"{self.folder / METADATA} is refused: it gives two entries one path")
        self._check_files(place for places in index.places.values() for place in places)
        self._check_files(index.objects.values())
        self.tensors = {names[flat]: spec for flat, spec in index.tensors.items()}
        self._pieces = {names[flat]: pieces for flat, pieces in index.pieces.items()}
        self._places = {names[flat]: places for flat, places in index.places.items()}
        self.values: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        for flat, place in index.objects.items():
            self._read_value(names[flat], paths[flat], place)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        shape = self.tensors[name].shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor, from the pieces that it touches."""
        pieces, places, dtype = self._pieces[name], self._places[name], self.tensors[name].dtype

        def read(which: int, part: Box) -> torch.Tensor:
            file = self.folder / places[which].file
            piece = self._load(places[which], f"a piece of {name} in {file}")
            kind = (piece.dtype, tuple(piece.shape)) if isinstance(piece, torch.Tensor) else None
            if kind != (dtype, pieces[which].lengths):
                raise CheckpointError(f"{file} holds something else where a piece of {name} should be")
            tensor: torch.Tensor = piece[part.slices]
            return tensor

        return assemble(dtype, Box(tuple(offsets), tuple(sizes)), pieces, read)

    def _check_files(self, places: Iterable[Place]) -> None:
        sizes: dict[str, int] = {}
        for place in places:
            path = self.folder / place.file
            if place.file not in sizes:
                sizes[place.file] = file_size(path)
            if place.start + place.length > sizes[place.file]:
                raise CheckpointError(f"{path} is cut short: it has {sizes[place.file]} bytes")

    def _load(self, place: Place, what: str) -> Any:
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.start)
            data = file.read(place.length)
        return load_entry(io.BytesIO(data), len(data), what)

    def _read_value(self, name: str, path: tuple[str, ...], place: Place) -> None:
        try:
            value = self._load(place, f"{name} in {self.folder / place.file}")
            encode(value, name)  # refuses what is no JSON
            put(self.values, path, value)
        except CheckpointError as error:
            self.left_out[name] = str(error)


def put(nested: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Put a value into nested dicts.

    Args:
        nested: the outermost dict.
        path: where to.
        value: what.

    Raises:
        CheckpointError: when something else is in the way.
    """
    at: Any = nested
    for part in path[:-1]:
        at = at.setdefault(part, {}) if isinstance(at, dict) else None
    if not isinstance(at, dict) or path[-1] in at:
        raise CheckpointError(f"{key_of(path)} has no place beside the other entries")
    at[path[-1]] = value
