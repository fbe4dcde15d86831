"""The process group: this process's rank and device, and the few collectives that are not the model's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from titan_train.device import choose_device

_RELEASE_SECONDS = 0.05


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Attributes:
        rank: Its rank in the default process group.
        world_size: Number of ranks.
        device: The device that it computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0


@contextmanager
def join_processes(wanted_device: str) -> Iterator[Process]:
    """Initialize the default process group for the `with` block, and destroy it afterwards.

    The launcher's environment variables (those of torchrun) describe the group; without them it has one process. CPU
    tensors use gloo even on GPUs, so that decisions of the host never wait for a device.

    Args:
        wanted_device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: If the device is not available.
    """
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(wanted_device, local_rank, local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch 2.15: public, but not listed for type checkers
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
        _leave_together()
    finally:
        dist.destroy_process_group()


def _leave_together() -> None:
    """Wait until gloo's threads have released the tensors that were sent.

    They release a tensor a little after the call that sent it has returned. One that does so while the interpreter
    shuts down aborts the process (`terminate called without an active exception`). Seen with torch 2.11 to 2.15.
    """
    if dist.get_world_size() > 1:
        dist.barrier()
        time.sleep(_RELEASE_SECONDS)


def sum_over_ranks(number: int) -> int:
    """Return the sum of a number over all ranks, computed on the host."""
    total = torch.tensor(number, dtype=torch.int64)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return int(total)
