"""Host memory that a save is copied to, so that training goes on while it is written; kept from save to save."""

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ckpt.save.plan import PlannedFile
from titan_ckpt.state.shards import Part

_ALIGNMENT = 4096  # that of memory pages, so that each file's bytes can go to the disk directly


class HostBuffer:
    """One copy of what this rank writes. It grows when it must, and is kept until `close`.

    Where there are CUDA tensors it is pinned, unless another process is to see it.
    """

    def __init__(self, *, shared: bool) -> None:
        """Prepare; takes no memory yet.

        Args:
            shared: whether another process has to see it.
        """
        self.handle = _anonymous_file() if shared else None
        self._memory: torch.Tensor | None = None
        self._files: Sequence[PlannedFile] | None = None
        self._views: dict[Part, torch.Tensor] = {}
        self._extents: list[tuple[int, int]] = []

    @property
    def nbytes(self) -> int:
        """How much memory it has."""
        return 0 if self._memory is None else self._memory.numel()

    def copy(self, files: Sequence[PlannedFile], tensors: Mapping[Part, torch.Tensor]) -> list[tuple[int, int]]:
        """Copy what is to be written; returns when all of it is there.

        Args:
            files: what this rank writes.
            tensors: what holds each part, on any device.

        Returns:
            Where each file's chunks start and stop in the memory; within, they follow one another without gaps.
        """
        on_cuda = any(tensors[part].is_cuda for file in files for part in file.parts)
        if self._files is not files:
            self._lay_out(files, pinned=on_cuda and self.handle is None)
        for part, view in self._views.items():
            view.copy_(tensors[part], non_blocking=on_cuda)
        for device in {tensors[part].device for part in self._views if tensors[part].is_cuda}:
            torch.cuda.synchronize(device)
        return self._extents

    def bytes_at(self, start: int, stop: int) -> Any:
        """Return a part of the memory as a buffer."""
        assert self._memory is not None
        return self._memory[start:stop].numpy()

    def close(self) -> None:
        """Give the memory back."""
        self._views, self._files, self._memory = {}, None, None
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def _lay_out(self, files: Sequence[PlannedFile], *, pinned: bool) -> None:
        self._extents, size = [], 0
        for file in files:
            length = sum(part.nbytes for part in file.parts)
            self._extents.append((size, size + length))
            size += length + -length % _ALIGNMENT
        memory = self._reserve(size, pinned=pinned)
        self._files, self._views = files, {}
        for (at, _), file in zip(self._extents, files, strict=True):
            for part in file.parts:
                self._views[part] = memory[at : at + part.nbytes].view(part.dtype).view(part.box.lengths)
                at += part.nbytes

    def _reserve(self, size: int, *, pinned: bool) -> torch.Tensor:
        if self._memory is not None and self._memory.numel() >= size and self._memory.is_pinned() >= pinned:
            return self._memory
        self._views, self._memory = {}, None  # first, so that there are never two
        if self.handle is None:
            memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
            self._memory = memory[-memory.data_ptr() % _ALIGNMENT :][:size]
        else:
            os.ftruncate(self.handle, max(size, 1))
            self._memory = torch.frombuffer(mmap.mmap(self.handle, max(size, 1)), dtype=torch.uint8)
        return self._memory


def _anonymous_file() -> int:
    """Open memory that has no name, so that nothing is left of it whoever is killed."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("titan-ckpt")
    handle, name = tempfile.mkstemp()
    os.unlink(name)
    return handle
