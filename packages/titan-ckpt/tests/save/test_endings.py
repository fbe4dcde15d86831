"""A program that ends without `close` finishes the save in flight, or says that it is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckpt_endings
from titan_ckpt import list_checkpoints, open_checkpoint, verify

CODES = {"returns": 0, "raises": 1, "exits": 3, "handler": 7, "ctrl-c": -2, "drops": 0}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    done = subprocess.run([sys.executable, ckpt_endings.__file__, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", ckpt_endings.CASES)
def test_the_save_in_flight_is_finished_or_reported(ended: Path, case: str) -> None:
    how, ending = case.split(", ")
    stderr, code = (ended / f"{case}.stderr").read_text(), int((ended / f"{case}.code").read_text())
    assert code == CODES[ending.split(" ")[0]], stderr
    infos = list_checkpoints(ended / case)
    said = "step 2 was not saved" in stderr or "step 2 was abandoned by KeyboardInterrupt" in stderr
    # Ctrl-C ends the wait at exit: once, a second wait says so; twice, the save is given up.
    lost = how.startswith("fail") or ending == "ctrl-c thrice"
    assert [info.step for info in infos] == ([1] if lost else [1, 2]), stderr
    assert said == lost, stderr
    waits = ending in ("ctrl-c twice", "ctrl-c thrice") or how == "no threads"
    assert ("finishing the save of step 2; Ctrl-C abandons it" in stderr) == waits, stderr
    assert ("No space left" in stderr) == (how.startswith("fail") and ending != "ctrl-c thrice"), stderr
    for info in infos:
        assert verify(info.path, "checksum") == []
        with open_checkpoint(info.path) as opened:
            assert torch.equal(opened.read("m/w"), torch.full((100_000,), float(info.step)))
    if ending != "ctrl-c thrice":
        assert ((ended / case / "ended-2").read_text() == "None") == (not lost)
        assert not (ended / case / ".lock").exists()
    assert os.path.exists(ended / case / "ended-1")
