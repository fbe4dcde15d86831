"""The one way in which tests run several processes: a pytest plugin, loaded by the root conftest.

A test asks for the fixture of its size and runs a case on it:

    def all_reduced(value: float) -> float:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor)
        return tensor.item()

    def test_all_reduce(ranks2: Ranks) -> None:
        assert ranks2.run(all_reduced, 1.0) == [2.0, 2.0]

A case is a function at the top of any module, the test's own included. It is called with the same arguments on every
rank, in a gloo process group that spans them; `torch.distributed.get_rank()` tells where it is. The processes stay
alive from case to case, for starting them costs more than most cases. A case that does not end in time, or whose
ranks die, fails with the stacks of all ranks, and the processes are replaced.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# All processes are forked from one that has imported torch: eight ranks then cost one import, not eight. What is not
# installed where a package is tested alone is passed over.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # imported by the first optimizer
        "torch.distributed.tensor.debug",
        "titan_model",
        "titan_parallel.apply",
        "titan_ckpt.checkpointer",
        "titan_train.run",
    ]
)

# Every mesh that a case builds leaves its groups behind, each with threads of gloo's that wake 100 times a second. So
# processes that have many threads are replaced, and all are stopped (SIGSTOP) while they have nothing to do. Groups
# cannot be destroyed instead: torch caches what it has worked out for a mesh, group included, for the next equal mesh.
MOST_THREADS = 250


class Ranks:
    """Processes joined in a gloo process group, which run cases together.

    Args:
        size: How many; the world size that a case sees.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._threads = 0  # of the rank that has most
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        self._folder = Path(self._scratch.name)

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
        """Call `case(*args)` on every rank.

        Args:
            case: A function at the top of a module.
            *args: What it is called with, on every rank alike.
            timeout: Seconds until the ranks are killed.

        Returns:
            What each rank returned, in the order of ranks.

        Raises:
            AssertionError: If a rank raised or died, or if not all ended in time; with tracebacks or stacks.
        """
        if self._threads > MOST_THREADS:
            self._stop()
        if not self._processes:
            self._start()
        self._signal(signal.SIGCONT)
        try:
            return self._answers(case, args, timeout)
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the processes, by force if they do not end by themselves."""
        self._stop()
        self._scratch.cleanup()

    def _answers(self, case: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((case, args))
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        values: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(waiting.values(), f"no answer after {timeout:.0f} s")
                break
            for answered in ready:
                assert isinstance(answered, Connection)
                rank = waiting.pop(answered)
                try:
                    values[rank], error, threads = answered.recv()
                    self._threads = max(self._threads, threads)
                except (EOFError, ConnectionError):
                    error = "the process died"
                if error:
                    failures[rank] = error
                    # The others may now wait for this rank forever.
                    deadline = min(deadline, time.monotonic() + 10)
        if failures:
            stacks = self._stacks() if waiting else ""
            self._kill()  # the ranks may no longer be in step
            reports = [f"rank {rank} of {case.__name__}:\n{text}" for rank, text in sorted(failures.items())]
            raise AssertionError("\n".join([*reports, stacks]))
        return values

    def _start(self) -> None:
        store = self._folder / f"store-{time.monotonic_ns()}"
        for rank in range(self.size):
            pipe, theirs = CONTEXT.Pipe()
            args = (theirs, rank, self.size, store, self._stack_file(rank))
            process = CONTEXT.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        self._answers(os.getpid, (), 240.0)  # importing torch takes long where others compete for the cores

    def _stop(self) -> None:
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
        self._kill()

    def _kill(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes, self._threads = [], [], 0

    def _stacks(self) -> str:
        self._signal(signal.SIGUSR1)
        time.sleep(1)
        files = [self._stack_file(rank) for rank in range(self.size)]
        return "\n".join(f"stacks of rank {rank}:\n{file.read_text()}" for rank, file in enumerate(files))

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"stacks-{rank}"

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, number)


def run_alone(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Call a function in a new process, which is forked from one that has imported torch.

    Args:
        function: A function at the top of a module.
        *args: What it is called with.
        timeout: Seconds until the process is killed.

    Returns:
        What it returned.

    Raises:
        AssertionError: If it raised, died, or did not end in time.
    """
    pipe, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve_once, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        pipe.send((function, args))
        assert pipe.poll(timeout), f"{function.__name__} took over {timeout} s"
        value, error, _ = pipe.recv()
    except (EOFError, ConnectionError):
        raise AssertionError(f"the process died in {function.__name__}") from None
    finally:
        process.kill()
        process.join()
        pipe.close()
    assert not error, error
    return value


def _serve_once(pipe: Connection) -> None:
    _find_test_modules()
    _answer(pipe, *pipe.recv())


def _serve(pipe: Connection, rank: int, size: int, store: Path, stack_file: Path) -> None:
    import numpy
    import torch
    import torch.distributed as dist

    _find_test_modules()
    torch.set_num_threads(1)
    with stack_file.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        while True:
            try:
                case, args = pipe.recv()
            except EOFError:
                break
            random.seed(0)
            numpy.random.seed(0)
            torch.manual_seed(0)
            _answer(pipe, case, args)
        dist.destroy_process_group()


def _answer(pipe: Connection, case: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        value, error = case(*args), ""
    except BaseException:
        value, error = None, traceback.format_exc()
    pipe.send((value, error, _thread_count()))


def _thread_count() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def _find_test_modules() -> None:
    # pytest names a test's module by its path from the root, so that is how a case in one is looked up.
    sys.path.append(str(ROOT))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Return the processes of any size; each size has one group for the session, started when it is first used."""
    groups: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        return groups.setdefault(size, Ranks(size))

    yield of_size
    for group in groups.values():
        group.close()


@pytest.fixture(scope="session")
def ranks1(ranks: Callable[[int], Ranks]) -> Ranks:
    """One process in a group of its own."""
    return ranks(1)


@pytest.fixture(scope="session")
def ranks2(ranks: Callable[[int], Ranks]) -> Ranks:
    """Two ranks."""
    return ranks(2)


@pytest.fixture(scope="session")
def ranks4(ranks: Callable[[int], Ranks]) -> Ranks:
    """Four ranks."""
    return ranks(4)


@pytest.fixture(scope="session")
def ranks8(ranks: Callable[[int], Ranks]) -> Ranks:
    """Eight ranks."""
    return ranks(8)
