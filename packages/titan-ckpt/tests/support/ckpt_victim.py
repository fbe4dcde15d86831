"""Processes that save, and are killed while they do. All are forked from one that has imported torch."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckpt_states import Held
from ranks import CONTEXT
from titan_ckpt import Checkpointer, CheckpointError
from titan_ckpt.save import saving, snapshot
from titan_ckpt.storage import local

# The named steps of a save, in order: a victim dies just before or just after one of them.
PHASES: dict[str, tuple[Any, str]] = {
    "collecting": (snapshot, "split"),
    "staging": (local.LocalStorage, "begin"),
    "opening a file": (local.LocalStorage, "create"),
    "writing": (local._Sink, "write"),
    "syncing": (local._Sink, "close"),
    "publishing": (local.LocalStorage, "publish"),
    "renaming": (os, "rename"),
    "pointing": (local.LocalStorage, "replace"),
    "removing": (local.LocalStorage, "remove"),
    "clearing": (local.LocalStorage, "clear_leftovers"),
    "all": (saving, "write_checkpoint"),
}
# What changes the disk or waits for it: between any two of these a kill finds the disk in another state.
INSTANTS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open", "pwrite", "link")


def state_of(step: int) -> dict[str, Held]:
    """What `step` must hold, bit for bit: enough tensors for four ranks."""
    tensors = {f"w{place}": torch.arange(20_000.0) * (place + 1) / (step + 1) for place in range(6)}
    return {"model": Held(**tensors), "data": Held(position=step, fraction=step / 3)}


def blank() -> dict[str, Held]:
    return {"model": Held(**{f"w{place}": torch.zeros(20_000) for place in range(6)}), "data": Held()}


def holds(state: dict[str, Held], step: int) -> bool:
    wanted = state_of(step)
    return state["data"].state == wanted["data"].state and all(
        torch.equal(tensor, state["model"].state[name]) for name, tensor in wanted["model"].state.items()
    )


class Victims:
    """The ranks of one job, each a process."""

    def __init__(self, world: int, scratch: Path, job: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        meeting = scratch / f"meeting-{time.monotonic_ns()}"
        self.processes = [
            CONTEXT.Process(target=_live, args=(rank, world, meeting, theirs if rank == 0 else None, job, args))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()
        theirs.close()

    def progress(self, timeout: float) -> list[int]:
        """Return what rank 0 has said so far, after waiting for a first word."""
        words = []
        try:
            while self.pipe.poll(0 if words else timeout):
                words.append(self.pipe.recv())
        except (EOFError, ConnectionResetError):
            pass
        return words

    def end(self, timeout: float = 60) -> tuple[list[int | None], list[int]]:
        """Wait for all of them to end by themselves; return exit codes, None for one that hangs, and last words."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        words = self.progress(timeout=0)
        self.pipe.close()
        return codes, words


def save_until_killed(pipe: Connection | None, folder: Path, asynchronous: bool) -> None:
    """Resume from the newest checkpoint, and report each step once it is certainly saved."""
    ckpt, state = Checkpointer(folder, keep_last=2, asynchronous=asynchronous), blank()
    found = ckpt.load(state)
    step = found.step if found else 0
    assert not found or holds(state, step)
    while True:
        step += 1
        ckpt.save(step, state_of(step))
        if not asynchronous:
            _tell(pipe, step)
        elif step > 1:
            _tell(pipe, step - 1)  # this save started, so the one before is complete


def save_and_die(
    pipe: Connection | None, folder: Path, step: int, phase: str, after: bool, rank: int, asynchronous: bool
) -> None:
    """Save a step; the given rank dies just before or after a phase of it."""
    ckpt = Checkpointer(folder, keep_last=2, asynchronous=asynchronous)
    ckpt.acquire_lock()
    ckpt.load(blank())
    if not dist.is_initialized() or dist.get_rank() == rank:
        target, name = PHASES[phase]
        original = getattr(target, name)

        def fatal(*args: Any, **kwargs: Any) -> Any:
            if after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(target, name, fatal)
    ckpt.save(step, state_of(step))
    ckpt.wait()
    _tell(pipe, step)


def save_once_and_die_at(pipe: Connection | None, folder: Path, step: int, instant: int) -> None:
    """Save, and kill this process just before the `instant`-th call that touches the disk."""
    calls = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > instant:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    ckpt = Checkpointer(folder, keep_last=2)
    ckpt.load(blank())
    for name in INSTANTS:
        setattr(os, name, counted(getattr(os, name)))
    ckpt.save(step, state_of(step))
    os._exit(0)


def kill_at_random(victims: Victims, delays: random.Random, longest: float) -> bool:
    """Kill one rank or all at a random instant; return whether it was all."""
    time.sleep(delays.uniform(0.0, longest))
    everyone = delays.random() < 0.5
    chosen = victims.processes if everyone else [delays.choice(victims.processes)]
    for process in chosen:
        process.kill()
    return everyone or len(victims.processes) == 1


def _live(
    rank: int, world: int, meeting: Path, pipe: Connection | None, job: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    code = 0
    try:
        job(pipe, *args)
    except CheckpointError as error:  # another rank died: this one gets an error, and does not hang
        code = 3 if "a collective failed" in str(error) else 4
    os._exit(code)


def _tell(pipe: Connection | None, step: int) -> None:
    if pipe is not None:
        pipe.send(step)
