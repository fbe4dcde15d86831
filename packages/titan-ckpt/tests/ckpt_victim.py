"""Processes that save, and are killed while they do."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ckpt_states import blank_state, holds_step, make_state
from titan_ckpt import Checkpointer

# What changes the disk or waits for it: between any two of these a kill finds the disk in another state.
INSTANTS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open")


def save_until_killed(folder: Path, asynchronous: bool, pipe: Connection) -> None:
    """Go on from the newest checkpoint, and tell of each step once it is surely saved."""
    ckpt, state = Checkpointer(folder, keep_last=2, asynchronous=asynchronous), blank_state()
    found = ckpt.load(state)
    step = found.step if found else 0
    assert not found or holds_step(state, step)
    while True:
        step += 1
        ckpt.save(step, make_state(step))
        if not asynchronous:
            pipe.send(step)
        elif step > 1:
            pipe.send(step - 1)  # to start this save, the one before had to be done


def save_once_and_die_at(folder: Path, step: int, instant: int) -> None:
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
    for name in INSTANTS:
        setattr(os, name, counted(getattr(os, name)))
    ckpt.save(step, make_state(step))
    os._exit(0)
