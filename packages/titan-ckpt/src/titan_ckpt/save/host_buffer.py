"""The host memory that an asynchronous save copies the state to; kept from save to save."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ckpt.save.plan import PlannedFile
from titan_ckpt.state.shards import Part

_ALIGNMENT = 4096  # bytes: a memory page, so that each file's data can be written with direct I/O


class HostBuffer:
    """Holds one copy of what this rank writes. It grows when necessary, and is kept until `close`.

    The memory is pinned if any tensor is on a CUDA device.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._files: Sequence[PlannedFile] | None = None
        self._views: dict[Part, torch.Tensor] = {}
        self._extents: list[tuple[int, int]] = []

    @property
    def nbytes(self) -> int:
        """Size of the allocated memory in bytes."""
        return 0 if self._memory is None else self._memory.numel()

    def copy(self, files: Sequence[PlannedFile], tensors: Mapping[Part, torch.Tensor]) -> list[tuple[int, int]]:
        """Copy what is to be written; return when the copy is complete.

        Args:
            files: The files that this rank writes.
            tensors: The tensor that holds each part, on any device.

        Returns:
            Start and stop of each file's data in the memory; the file's chunks are stored there without gaps.
        """
        on_cuda = any(tensors[part].is_cuda for file in files for part in file.parts)
        if self._files is not files:
            self._lay_out(files, pinned=on_cuda)
        for part, view in self._views.items():
            view.copy_(tensors[part], non_blocking=on_cuda)
        for device in {tensors[part].device for part in self._views if tensors[part].is_cuda}:
            torch.cuda.synchronize(device)
        return self._extents

    def bytes_at(self, start: int, stop: int) -> Any:
        """Return a range of the memory as a buffer."""
        assert self._memory is not None
        return self._memory[start:stop].numpy()

    def close(self) -> None:
        """Free the memory."""
        self._views, self._files, self._memory = {}, None, None

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
        self._views, self._memory = {}, None  # freed before allocating, so that there are never two
        memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
        self._memory = memory[-memory.data_ptr() % _ALIGNMENT :][:size]
        return self._memory
