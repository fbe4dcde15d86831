"""The one way in which these tests run several processes.

A `Group` keeps its processes, joined by gloo, over many cases: starting them costs far more than a case does. A case
is a module-level function `case(rank, world, *args)` of an importable module. If a case does not end in time, the
stacks of all processes are dumped and the group is killed.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# All processes come from one that has imported torch: six of them then cost one import, not six.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["titan_train.running", "titan_ckpt.checkpointer", "torch._dynamo"])

# Every mesh that a case builds leaves its groups behind, each with threads of gloo's that wake 100 times a second. So
# processes are replaced now and then, and those that have nothing to do are stopped.
MOST_CASES = 12


class Group:
    """Processes that run cases together."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._start()

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="titan-group-"))
        self.pipes: list[Connection] = []
        self.processes = []
        self._cases = 0
        for rank in range(self.world):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, rank, self.world, str(self.folder)), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
        """Run a case on every rank and return what each returned; raise what the first failing rank raised."""
        if self._cases == MOST_CASES:
            self.close()
            self._start()
        self._cases += 1
        self._signal(signal.SIGCONT)
        try:
            return self._run(case, args, timeout)
        finally:
            self._signal(signal.SIGSTOP)

    def _run(self, case: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((case, args))
        waiting = dict(zip(self.pipes, range(self.world), strict=True))
        values: list[Any] = [None] * self.world
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = f"ranks {sorted(waiting.values())} of {case.__name__} gave no answer; {failures}"
                raise TimeoutError(f"{stuck}\n{self._kill_and_dump()}")
            for pipe in ready:
                rank = waiting.pop(pipe)
                ok, value = pipe.recv()
                if ok:
                    values[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + 10)  # the others may now wait for this one forever
        if failures:
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return values

    def close(self) -> None:
        """End the processes, by force if they do not go by themselves."""
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def _kill_and_dump(self) -> str:
        self._signal(signal.SIGUSR1)
        time.sleep(1)
        texts = [path.read_text() for path in sorted(self.folder.glob("stacks-*"))]
        for process in self.processes:
            process.kill()
        return "\n".join(texts)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)


def _serve(pipe: Connection, rank: int, world: int, folder: str) -> None:
    stacks = open(f"{folder}/stacks-{rank}", "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, case(rank, world, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
    sys.exit(0)
