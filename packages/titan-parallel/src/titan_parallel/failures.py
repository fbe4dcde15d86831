"""Exceptions in the middle of a call, when the other ranks wait for what this one can no longer send.

They find out when this rank's process ends or by a time-out, and then raise what torch says of that. `Failures` lets
them raise what happened first instead. `ParallelModel` keeps one.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.distributed as dist

from titan_parallel._torch_compat import default_store


class Failures:
    """The first exception of any rank in each call of a model, by way of the store of the process group.

    Args:
        group: From `host_group`; all ranks must create this together.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        number = torch.zeros((), dtype=torch.int64, device="cpu")
        if group is not None:
            if dist.get_rank() == 0:
                number += default_store().add("titan_parallel/models", 1)
            dist.broadcast(number, group=group, group_src=0)
        self._prefix = f"titan_parallel/{int(number)}"
        self._calls = 0

    def begin(self) -> None:
        """Count a call; all ranks make the same ones."""
        self._calls += 1

    def first(self, call: str, error: BaseException) -> BaseException:
        """Report an exception, and return it or, if it follows from one of another rank, an error that names that."""
        if self._group is None:
            return error
        mine = f"{type(error).__name__}: {error}"
        found = mine
        with suppress(Exception):  # the store is gone if rank 0 is
            key = f"{self._prefix}/{self._calls}"
            rank, _, found = default_store().compare_set(key, "", f"{dist.get_rank()}|{mine}").decode().partition("|")
        if found == mine or not isinstance(error, RuntimeError):  # torch's errors of communication are RuntimeErrors
            return error
        return RuntimeError(f"{call} failed on rank {rank}: {found}")
