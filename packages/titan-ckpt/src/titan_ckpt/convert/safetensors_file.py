"""One safetensors file as a source of tensors, read with the safetensors library."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from titan_ckpt.convert._files import file_size
from titan_ckpt.convert.source import Spec
from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.boxes import Box
from titan_ckpt.format.dtypes import TYPES
from titan_ckpt.messages import reason_of


class SafetensorsFile:
    """The tensors of one safetensors file.

    The library checks the header when it opens a file: its length, that the entries fill the file without gap or
    overlap, and that their lengths follow from shapes and dtypes.

    Attributes:
        tensors: The tensors, in alphabetical order.
        values: Empty.
        metadata: The header's `__metadata__`.
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Args:
            path: The file.

        Raises:
            CheckpointError: If it is not a valid safetensors file.
        """
        file_size(path)
        self.path = path
        self.values: Mapping[str, Any] = {}
        self.tensors: dict[str, Spec] = {}
        try:
            self._file = _open(path)
            self.metadata: dict[str, str] = self._file.metadata() or {}
            for key in self._file.keys():  # noqa: SIM118  (not a dict)
                view = self._file.get_slice(key)
                if view.get_dtype() not in TYPES:
                    raise CheckpointError(f"{path}: {key} has dtype {view.get_dtype()}, which torch does not support")
                self.tensors[key] = Spec(TYPES[view.get_dtype()], tuple(view.get_shape()))
        except (SafetensorError, OSError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path} is not a valid safetensors file ({reason_of(error)})") from error

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        with self._errors(name):
            tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor; only that slice is read from the disk."""
        box = Box(tuple(offsets), tuple(sizes))
        if not box.lengths or not box.volume:  # the library cannot slice scalars, or cut empty slices
            return self.read(name)[box.slices]
        with self._errors(name):
            tensor: torch.Tensor = self._file.get_slice(name)[box.slices]
        return tensor

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Report what reading a tensor raises: the file may have changed since its header was read."""
        try:
            with system_errors(f"read {name} of {self.path}"):
                yield
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({reason_of(error)})") from error


def _open(path: Path) -> Any:
    """Open a file; typed as Any because the library's methods have no annotations."""
    return safe_open(path, framework="pt")
