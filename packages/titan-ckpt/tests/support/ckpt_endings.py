"""A program whose forks each end in another way right after an asynchronous save, without `close`.

Usage: ckpt_endings.py DIRECTORY. Each case writes its checkpoints to a folder of its name, and its stderr and exit code
beside it. All are forks of one process, because importing torch takes long.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from titan_ckpt import Checkpointer, SaveEnd
from titan_ckpt.save import saving
from titan_ckpt.save.file_writer import write_file

ENDINGS = ("returns", "raises", "exits", "handler", "ctrl-c", "ctrl-c twice", "ctrl-c thrice")
CASES = [f"{how}, {ending}" for how in ("saved", "fails") for ending in ENDINGS] + [
    "no threads, returns", "saved, drops", "fails, drops", "failed, returns",
]  # fmt: skip


class Held:
    def __init__(self, value: float) -> None:
        self.tensor = torch.full((100_000,), value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"w": self.tensor}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError


def run(directory: Path, how: str, ending: str) -> None:
    """Save step 1, start to save step 2, and end."""

    def write(*args: object) -> object:
        if ending.startswith("ctrl-c"):
            wait_until((directory / "go").exists)
        elif how != "failed":
            time.sleep(1.0)  # the main thread has ended by then
        if how.startswith("fail"):
            raise OSError(28, "No space left on device")
        return write_file(*args)  # type: ignore[arg-type]

    def ended(end: SaveEnd) -> None:
        (directory / f"ended-{end.step}").write_text(str(end.error))

    ckpt = Checkpointer(directory, asynchronous=True, on_save_end=ended)
    ckpt.save(1, {"m": Held(1)})
    ckpt.wait()
    mock.patch.object(saving, "write_file", write).start()
    if how == "no threads":  # as from Python 3.12 on at the end of a program, and where limits are reached
        mock.patch.object(threading.Thread, "start", refuse).start()
    state = Held(2)
    ckpt.save(2, {"m": state})
    state.tensor.fill_(3)
    if how == "failed":
        while ckpt.in_flight is not None:
            time.sleep(0.01)
    end(directory, ending, ckpt)


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.02)


def end(directory: Path, ending: str, ckpt: Checkpointer) -> None:
    if ending == "raises":
        raise ValueError("a mistake")
    if ending == "exits":
        sys.exit(3)
    if ending == "handler":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    if ending.startswith("ctrl-c"):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        pid, log = os.getpid(), directory.parent / f"{directory.name}.stderr"
        after = ["KeyboardInterrupt", "finishing the save"][: {"ctrl-c": 0, "ctrl-c twice": 1}.get(ending, 2)]
        if os.fork() == 0:
            for text in after:
                wait_until(lambda text=text: text in log.read_text())
                time.sleep(0.2)  # the program waits again
                os.kill(pid, signal.SIGINT)
            if ending != "ctrl-c thrice":
                wait_until(lambda: ("finishing" if after else "KeyboardInterrupt") in log.read_text())
                (directory / "go").touch()
            os._exit(0)
        signal.raise_signal(signal.SIGINT)
    if ending == "drops":
        del ckpt


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't create new thread at interpreter shutdown")


def main() -> None:
    directory = Path(sys.argv[1])
    children = {}
    for case in CASES:
        child = os.fork()
        if child == 0:
            log = os.open(directory / f"{case}.stderr", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 2)
            run(directory / case, *case.split(", "))
            return
        children[child] = case
    while children:
        child, status = os.wait()
        case = children.pop(child)
        (directory / f"{case}.code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
