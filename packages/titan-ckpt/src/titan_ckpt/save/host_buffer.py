"""The host memory that an asynchronous save copies the state to; kept from save to save."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ckpt.messages import get_logger
from titan_ckpt.save.plan import PlannedFile
from titan_ckpt.state.shards import Part

logger = get_logger(__name__)

_ALIGNMENT = 4096  # bytes: a memory page, so that each file's data can be written with direct I/O


class HostBuffer:
    """Holds one copy of what this rank writes; it grows when necessary. It belongs to one save at a time.

    The memory is pinned if any tensor is on a CUDA device.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._can_pin = True
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
        devices = {tensors[part].device for file in files for part in file.parts if tensors[part].is_cuda}
        on_cuda = bool(devices)
        for device in devices:
            # Streams other than the current one may still write to the tensors, and an interrupted copy to the memory.
            torch.cuda.synchronize(device)
        if self._files is not files:
            self._lay_out(files, pinned=on_cuda)
        for part, view in self._views.items():
            view.copy_(tensors[part], non_blocking=on_cuda)
        for device in devices:
            torch.cuda.synchronize(device)
        return self._extents

    def bytes_at(self, start: int, stop: int) -> Any:
        """Return a range of the memory as a buffer."""
        assert self._memory is not None
        return self._memory[start:stop].numpy()

    def _lay_out(self, files: Sequence[PlannedFile], *, pinned: bool) -> None:
        self._files = None  # until the layout is complete
        extents, size = [], 0
        for file in files:
            length = sum(part.nbytes for part in file.parts)
            extents.append((size, size + length))
            size += length + -length % _ALIGNMENT
        memory, views = self._reserve(size, pinned=pinned), {}
        for (at, _), file in zip(extents, files, strict=True):
            for part in file.parts:
                views[part] = memory[at : at + part.nbytes].view(part.dtype).view(part.box.lengths)
                at += part.nbytes
        self._extents, self._views, self._files = extents, views, files

    def _reserve(self, size: int, *, pinned: bool) -> torch.Tensor:
        large_enough = self._memory is not None and self._memory.numel() >= size
        if self._memory is not None and large_enough and self._memory.is_pinned() >= (pinned and self._can_pin):
            return self._memory
        self._views, self._memory = {}, None  # freed before allocating, so that there are never two
        memory = self._allocate(size + _ALIGNMENT, pinned=pinned and self._can_pin)
        self._memory = memory[-memory.data_ptr() % _ALIGNMENT :][:size]
        return self._memory

    def _allocate(self, nbytes: int, *, pinned: bool) -> torch.Tensor:
        if pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._can_pin = False
                logger.warning(
                    "%.1f GiB of host memory cannot be pinned (%s): saves copy to ordinary memory, which is slower",
                    nbytes / 2**30,
                    str(error).split("\n")[0],
                )
        return torch.empty(nbytes, dtype=torch.uint8)
