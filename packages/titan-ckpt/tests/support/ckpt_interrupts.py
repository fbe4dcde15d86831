"""Exceptions injected at any line of a Checkpointer's calls, by tracing; and what must be true after each."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import titan_ckpt
from ckpt_states import Held
from titan_ckpt import Checkpointer, CheckpointError, list_checkpoints, open_checkpoint, verify
from titan_ckpt.save import saving
from titan_ckpt.save.file_writer import write_file

ROOT = str(Path(titan_ckpt.__file__).parent)


@dataclass(frozen=True)
class Line:
    """A line of the package, at its n-th execution."""

    file: str
    number: int
    occurrence: int


class Tracer:
    """Counts the lines of the package that a thread executes, and raises at one of them."""

    def __init__(self, target: Line | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.target, self.error = target, error
        self.seen: Counter[tuple[str, int]] = Counter()
        self.hit = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(ROOT) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self.hit:
            file, number = frame.f_code.co_filename[len(ROOT) + 1 :], frame.f_lineno
            self.seen[file, number] += 1
            if self.target == Line(file, number, self.seen[file, number]):
                self.hit = True
                raise self.error("injected")
        return self._line

    def lines(self) -> list[Line]:
        """Return each line that was executed, at its first execution and at its last."""
        found = [Line(*at, occurrence) for at, count in self.seen.items() for occurrence in sorted({1, count})]
        return sorted(found, key=lambda line: (line.file, line.number, line.occurrence))


@contextmanager
def tracing(tracer: Tracer, *, in_threads: bool) -> Iterator[None]:
    """Trace this thread, or the threads that are started meanwhile and save."""

    def of_savers(*args: Any) -> Any:
        return tracer(*args) if threading.current_thread().name.startswith("titan-ckpt-save") else None

    before = sys.gettrace()
    if in_threads:
        threading.settrace(of_savers)
    else:
        sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]


def state_of(step: int) -> dict[str, Held]:
    return {"model": Held(**{f"w{n}": torch.full((500,), float(step * 10 + n)) for n in range(3)}),
            "data": Held(position=step)}  # fmt: skip


def blank() -> dict[str, Held]:
    return {"model": Held(**{f"w{n}": torch.zeros(500) for n in range(3)}), "data": Held()}


def set_to(state: dict[str, Held], step: int) -> None:
    """Train: the live tensors change in place."""
    for name, tensor in state_of(step)["model"].state.items():
        state["model"].state[name].copy_(tensor)
    state["data"].state = {"position": step}


def calls(ckpt: Checkpointer, state: dict[str, Held]) -> Iterator[Callable[[], object]]:
    """Each public call, in the order of a run."""
    yield lambda: ckpt.save(2, state)
    set_to(state, 3)
    yield lambda: ckpt.save(3, state)
    set_to(state, 4)
    yield ckpt.wait
    yield lambda: ckpt.load(blank())
    yield lambda: ckpt.save(4, state)
    set_to(state, 5)
    yield ckpt.close


def interrupted(folder: Path, tracer: Tracer | None, asynchronous: bool, in_threads: bool = False) -> str:
    """Run all calls, interrupted once on this rank if there is a tracer; then save as the usual idiom does.

    Returns:
        What the Checkpointer does after the interrupt: "usable" or "refuses".
    """
    with mock.patch.object(saving, "write_file", slow_write if asynchronous else saving.write_file):
        return _interrupted(folder, tracer, asynchronous, in_threads)


def slow_write(*args: Any) -> Any:
    """Write while the caller's thread is already waiting, or changing the state."""
    time.sleep(0.02)
    return write_file(*args)


def _interrupted(folder: Path, tracer: Tracer | None, asynchronous: bool, in_threads: bool) -> str:
    ckpt, state = Checkpointer(folder, asynchronous=asynchronous), state_of(1)
    ckpt.save(1, state)
    ckpt.wait()
    set_to(state, 2)
    outcome = "usable"
    try:
        for call in calls(ckpt, state):
            if tracer is None:
                call()
            else:
                with tracing(tracer, in_threads=in_threads):
                    call()
    except (KeyboardInterrupt, MemoryError, CheckpointError):
        pass
    set_to(state, 6)
    try:
        with suppress(CheckpointError):
            ckpt.wait()  # raises what a save in flight failed with
        ckpt.save(6, state)
        set_to(state, 7)
        ckpt.wait()
    except CheckpointError:
        outcome = "refuses"
    with suppress(CheckpointError):
        ckpt.close()
    return outcome


def check(folder: Path, outcome: str) -> None:
    """Every published checkpoint holds its own step's values; and what was saved last is there."""
    steps = []
    for info in list_checkpoints(folder):
        assert verify(info.path, "checksum") == [], info.path
        with open_checkpoint(info.path) as opened:
            assert opened.values == {"data": {"position": info.step}}, info.path
            for name, tensor in state_of(info.step)["model"].state.items():
                assert torch.equal(opened.read(f"model/{name}"), tensor), (info.path, name)
        steps.append(info.step)
    assert steps[0] == 1
    assert (6 in steps) or outcome == "refuses", (steps, outcome)


def save_afterwards(folder: Path) -> None:
    """A new Checkpointer in the same process resumes and saves: no lock and no thread stands in its way."""
    state = blank()
    with Checkpointer(folder) as ckpt:
        found = ckpt.load(state, required=True)
        assert found is not None
        set_to(state, 9)
        ckpt.save(9, state)


def lines_of(folder: Path, asynchronous: bool, in_threads: bool, rank: int = 0) -> list[Line]:
    """Return the lines to interrupt on a rank: those that an uninterrupted run executes there."""
    traced = not dist.is_initialized() or dist.get_rank() == rank
    tracer = Tracer()
    assert interrupted(folder, tracer if traced else None, asynchronous, in_threads) == "refuses"  # it is closed
    return tracer.lines()


def interrupt_each(
    scratch: Path, lines: Iterable[Line], asynchronous: bool, in_threads: bool, rank: int = 0
) -> tuple[Counter[str], list[str]]:
    """Interrupt at each line in turn; return what the Checkpointer did how often, and what was wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    several = dist.is_initialized() and dist.get_world_size() > 1
    for place, line in enumerate(lines):
        folder = scratch / f"{asynchronous}-{in_threads}-{rank}-{place}"
        tracer = Tracer(line, MemoryError if in_threads else KeyboardInterrupt)
        own = not several or dist.get_rank() == rank
        outcome = interrupted(folder, tracer if own else None, asynchronous, in_threads)
        if several:
            dist.barrier()
        outcomes[outcome if tracer.hit or not own else "not reached"] += 1
        try:
            if not several or dist.get_rank() == 0:
                check(folder, outcome if tracer.hit or not own else "refuses")
            if several:
                dist.barrier()
            save_afterwards(folder)
        except (AssertionError, CheckpointError) as error:
            wrong.append(f"{line}: {type(error).__name__}: {error}")
    return outcomes, wrong


def among_ranks(scratch: Path, asynchronous: bool, in_threads: bool, rank: int, every: int) -> tuple[Any, Any]:
    """What each of several ranks does: the same, interrupted on one of them."""
    lines = lines_of(scratch / f"whole-{asynchronous}-{in_threads}-{rank}", asynchronous, in_threads, rank)
    shared = [lines]
    dist.broadcast_object_list(shared, src=rank)
    return interrupt_each(scratch, shared[0][::every], asynchronous, in_threads, rank)
