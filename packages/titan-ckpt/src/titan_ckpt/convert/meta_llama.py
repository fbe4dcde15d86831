"""Meta's `consolidated.*.pth`: the weights of a Llama as published, one file per model-parallel rank."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._assemble import assemble
from titan_ckpt.convert._json import read_json
from titan_ckpt.convert.source import Spec
from titan_ckpt.convert.torch_file import TorchFile
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box

PARAMS = "params.json"
_FILE_NAME = re.compile(r"consolidated\.([0-9]{2})\.pth")
# The dimension along which the ranks' parts are joined: dim 0 of column-parallel weights, dim 1 of row-parallel ones. A
# tensor that matches no pattern must be the same in all files. The embedding is sharded along the vocabulary (Llama 3)
# or the model dim (Llama 1 and 2).
JOINED_ALONG: tuple[tuple[str, int], ...] = (
    ("*.attention.w[qkv].weight", 0),
    ("*.attention.wo.weight", 1),
    ("*.feed_forward.w[13].weight", 0),
    ("*.feed_forward.w2.weight", 1),
    ("output.weight", 0),
)
_EMBEDDING, _FINAL_NORM, _TABLE = "tok_embeddings.weight", "norm.weight", "rope.freqs"


class MetaDirectory:
    """The weights in `consolidated.00.pth` and following files, joined.

    Attributes:
        tensors: The tensors, without `rope.freqs`, a table that models compute.
        values: Empty.
        params: The content of params.json; empty without one.
    """

    def __init__(self, directory: str | Path, joined_along: Sequence[tuple[str, int]] = JOINED_ALONG) -> None:
        """Open a directory; no tensor data is read.

        Args:
            directory: The directory.
            joined_along: Shell patterns of names, with the dimension along which the files' parts are joined.

        Raises:
            CheckpointError: If files are absent, corrupt or hostile, or their parts do not fit together.
        """
        self.directory = Path(directory)
        self.values: Mapping[str, Any] = {}
        self.params = read_json(self.directory / PARAMS) if (self.directory / PARAMS).exists() else {}
        self._files = [TorchFile(path) for path in _files_of(self.directory)]
        self._joined_along = joined_along
        self.tensors: dict[str, Spec] = {}
        self._parts: dict[str, list[Box]] = {}
        for name in self._files[0].tensors:
            if name != _TABLE:
                self._join(name)
        strange = {name for file in self._files[1:] for name in file.tensors} - self._files[0].tensors.keys()
        if strange:
            raise CheckpointError(f"{self.directory}: {min(strange)} is not in all files")

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor, joined from all files."""
        shape = self.tensors[name].shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor from the files that hold it."""

        def read(which: int, part: Box) -> torch.Tensor:
            return self._files[which].read(name)[part.slices]

        return assemble(self.tensors[name].dtype, Box(tuple(offsets), tuple(sizes)), self._parts[name], read)

    def _join(self, name: str) -> None:
        try:
            specs = [file.tensors[name] for file in self._files]
        except KeyError:
            raise CheckpointError(f"{self.directory}: {name} is not in all files") from None
        first, dim = specs[0], self._dim_of(name)
        if dim is None or len(specs) == 1:
            if any(spec != first for spec in specs):
                raise CheckpointError(
                    f"{self.directory}: {name} differs between files, and it is not known how to join it"
                )
            self.tensors[name], self._parts[name] = first, [Box((0,) * len(first.shape), first.shape)]
            return
        parts, at = [], 0
        for spec in specs:
            if spec.dtype != first.dtype or _without(spec.shape, dim) != _without(first.shape, dim):
                raise CheckpointError(
                    f"{self.directory}: the parts of {name} do not fit together along dimension {dim}"
                )
            parts.append(Box(tuple(at if place == dim else 0 for place in range(len(spec.shape))), spec.shape))
            at += spec.shape[dim]
        self.tensors[name] = Spec(first.dtype, (*first.shape[:dim], at, *first.shape[dim + 1 :]))
        self._parts[name] = parts

    def _dim_of(self, name: str) -> int | None:
        if name == _EMBEDDING:
            norm = self._files[0].tensors.get(_FINAL_NORM)
            return 0 if norm is not None and self._files[0].tensors[name].shape[1:] == norm.shape else 1
        return next((dim for pattern, dim in self._joined_along if fnmatchcase(name, pattern)), None)


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :]) if dim < len(shape) else (-1,)


def _files_of(directory: Path) -> list[Path]:
    listed = directory.iterdir() if directory.is_dir() else ()
    names = sorted(path.name for path in listed if _FILE_NAME.fullmatch(path.name))
    wanted = [f"consolidated.{place:02d}.pth" for place in range(len(names))]
    if not names or names != wanted:
        found = f"has {', '.join(names)}: one is missing" if names else "holds no consolidated.00.pth"
        raise CheckpointError(f"{directory} {found}")
    return [directory / name for name in names]
