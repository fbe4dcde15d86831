"""One safetensors file as a source of tensors, by the safetensors library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from titan_ckpt.convert._files import file_size
from titan_ckpt.convert.source import Spec
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box
from titan_ckpt.format.dtypes import TYPES


class SafetensorsFile:
    """The tensors of one safetensors file.

    The library checks the header when it opens a file: its length, that the entries fill the file without gap or
    overlap, and that shapes and types make their lengths.

    Attributes:
        tensors: what there is, in alphabetical order.
        values: nothing.
        metadata: the header's free text, by key.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Args:
            path: the file.

        Raises:
            CheckpointError: when it is no sound safetensors file.
        """
        file_size(path)
        self.values: Mapping[str, Any] = {}
        self.tensors: dict[str, Spec] = {}
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
            self.metadata: dict[str, str] = self._file.metadata() or {}
            for key in self._file.keys():  # noqa: SIM118  (it is no dict)
                view = self._file.get_slice(key)
                if view.get_dtype() not in TYPES:
                    raise CheckpointError(f"{path}: {key} is of type {view.get_dtype()}, which torch does not have")
                self.tensors[key] = Spec(TYPES[view.get_dtype()], tuple(view.get_shape()))
        except (SafetensorError, OSError, OverflowError) as error:
            raise CheckpointError(f"{path} is no sound safetensors file ({error})") from error

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor; no more than that part is read from the disk."""
        box = Box(tuple(offsets), tuple(sizes))
        if not box.lengths or not box.volume:  # the library knows no slices of scalars, nor empty ones
            return self.read(name)[box.slices]
        tensor: torch.Tensor = self._file.get_slice(name)[box.slices]
        return tensor
