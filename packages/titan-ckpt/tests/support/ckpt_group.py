"""Worker processes for tests that need several ranks, or a process to kill.

All come from one forkserver that has imported torch: six workers then cost one import, not six.
"""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo is imported by the first optimizer: once here, or seconds in every worker.
CONTEXT.set_forkserver_preload(["torch._dynamo", "ckpt_cases"])
MOST_CASES = 12


class WorkerGroup:
    """Ranks that stay alive from one case to the next, joined in a gloo process group.

    Each group of a mesh that a case leaves behind has threads of gloo's that wake 100 times a second: so ranks are
    replaced now and then, and stopped while they have nothing to do.

    A case is a function of a module that workers can import; it is called on every rank with the same arguments.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection, Path]] = []
        self._cases = 0
        self._scratch = tempfile.TemporaryDirectory(prefix="ckpt-group-")

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = 40) -> list[Any]:
        """Call `case(*args)` on every rank; return what each rank returned, in order.

        Raises:
            AssertionError: when a rank raised, or when not all were done in time; then with all their stacks.
        """
        if self._cases == MOST_CASES:
            self._end()
        if not self._workers:
            self._start()
            self._run(os.getpid, (), 200)  # to import torch takes long where others compete for the cores
        self._cases += 1
        self._signal(signal.SIGCONT)
        try:
            return self._run(case, args, timeout)
        finally:
            self._signal(signal.SIGSTOP)

    def _run(self, case: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for _, pipe, _ in self._workers:
            pipe.send((case, args))
        until = time.monotonic() + timeout
        answers = []
        for _, pipe, _ in self._workers:
            if not pipe.poll(max(0.0, until - time.monotonic())):
                raise AssertionError(f"{case.__name__} took over {timeout} s; stacks:\n{self._stacks_and_kill()}")
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise AssertionError(f"a rank died in {case.__name__}:\n{self._stacks_and_kill()}") from None
        failures = [f"rank {rank}:\n{told}" for rank, (_, told) in enumerate(answers) if told]
        if failures:
            self._stacks_and_kill()  # the ranks may no longer be in step
            raise AssertionError("\n".join(failures))
        return [answer for answer, _ in answers]

    def close(self) -> None:
        """End the ranks, by force if they do not go by themselves."""
        self._end()
        self._scratch.cleanup()

    def _end(self) -> None:
        self._signal(signal.SIGCONT)
        for _, pipe, _ in self._workers:
            pipe.send(None)
        for process, _, _ in self._workers:
            process.join(10)
        if self._workers:
            self._kill()

    def _signal(self, number: signal.Signals) -> None:
        for process, _, _ in self._workers:
            if process.is_alive():
                os.kill(process.pid, number)

    def _start(self) -> None:
        self._cases = 0
        meeting = Path(self._scratch.name) / f"meeting-{time.monotonic_ns()}"
        for rank in range(self.size):
            pipe, theirs = CONTEXT.Pipe()
            stacks = meeting.with_name(f"{meeting.name}-stacks-{rank}")
            process = CONTEXT.Process(target=_serve, args=(rank, self.size, meeting, stacks, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, pipe, stacks))

    def _stacks_and_kill(self) -> str:
        self._signal(signal.SIGUSR1)
        time.sleep(0.5)
        told = [
            f"rank {rank}:\n{stacks.read_text() if stacks.exists() else ''}"
            for rank, (_, _, stacks) in enumerate(self._workers)
        ]
        self._kill()
        return "\n".join(told)

    def _kill(self) -> None:
        for process, pipe, _ in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


def run_apart(function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
    """Call `function(*args)` in a process of its own, which is forked from one that has imported torch.

    Raises:
        AssertionError: when it raised, died, or was not done in time.
    """
    pipe, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_answer, args=(function, args, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert pipe.poll(timeout), f"{function.__name__} took over {timeout} s"
        result, failure = pipe.recv()
    except EOFError:
        raise AssertionError(f"the process died in {function.__name__}") from None
    finally:
        process.kill()
        process.join()
        pipe.close()
    assert not failure, failure
    return result


def _answer(function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    try:
        pipe.send((function(*args), ""))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def _serve(rank: int, size: int, meeting: Path, stacks: Path, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with stacks.open("w") as told:
        faulthandler.register(signal.SIGUSR1, file=told, all_threads=True)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        while (order := pipe.recv()) is not None:
            case, args = order
            try:
                pipe.send((case(*args), ""))
            except BaseException:
                pipe.send((None, traceback.format_exc()))
        dist.destroy_process_group()
