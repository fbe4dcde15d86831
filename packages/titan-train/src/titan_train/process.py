"""This process among the others: the process group and its few collectives that are not the model's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from titan_train.hardware import choose_device

_LETTING_GO_SECONDS = 0.05


@dataclass(frozen=True)
class Process:
    """Attributes: rank, world size, and the device this process computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


@contextmanager
def join_processes(wanted_device: str) -> Iterator[Process]:
    """Join the process group that the launcher's environment describes, or one of a single process.

    CPU tensors go over gloo also on GPUs, so that what the host decides never waits for a device.

    Args:
        wanted_device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: If the device cannot be had.
    """
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(wanted_device, local_rank, local_world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
        _leave_together()
    finally:
        dist.destroy_process_group()


def _leave_together() -> None:
    """Wait until what was sent is let go of.

    The threads of a gloo group release tensors a little after the call that sent them has returned. One that does so
    when the interpreter has begun to end aborts the process (`terminate called without an active exception`).
    """
    if dist.get_world_size() > 1:
        dist.barrier()
        time.sleep(_LETTING_GO_SECONDS)


def sum_over_ranks(number: int) -> int:
    """Return a number summed over all ranks, through the host."""
    total = torch.tensor(number, dtype=torch.int64)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return int(total)
