"""Going back: the line of a run, what is set aside, and `restore`."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from ckpt_states import Held
from titan_ckpt import (
    Checkpointer,
    CheckpointError,
    Retention,
    list_checkpoints,
    open_checkpoint,
    pin,
    plan_prune,
    restore,
)
from titan_ckpt.cli import main
from titan_ckpt.manage import lineage
from titan_ckpt.storage.local import LocalStorage
from titan_ckpt.storage.open import open_storage


def state_of(value: float) -> dict[str, Held]:
    return {"m": Held(w=torch.full((4,), float(value)))}


def save(folder: Path | str, *values: float, back_to: int | None = None) -> None:
    """Resume from the newest step, or another one; save each value as the step of its whole number."""
    with Checkpointer(folder) as ckpt:
        ckpt.load(state_of(0), step=back_to)
        for value in values:
            ckpt.save(int(value), state_of(value))


def line(folder: Path | str) -> list[float]:
    """Return the values of the checkpoints that count, and check that the newest of them is what is resumed."""
    found = []
    for info in list_checkpoints(folder):
        with open_checkpoint(info.path) as opened:
            found.append(float(opened.read("m/w")[0]))
    if found:
        state = state_of(0)
        assert Checkpointer(folder).load(state) is not None
        assert state["m"].state["w"][0] == torch.tensor(found[-1])
    return found


def aside(folder: Path | str) -> list[int | None]:
    return [lineage.step_of_aside(name) for name in lineage.aside_names(open_storage(str(folder)))]


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "c") if request.param == "disk" else f"memory://{tmp_path}/c"


def test_going_back_sets_later_steps_aside(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    save(folder, 10, 20, 30)
    with caplog.at_level(logging.WARNING):
        save(folder, 20.5, back_to=10)
    assert "goes on from step 10, so later checkpoints are set aside: step-00000020 is now .aside-" in caplog.text
    assert line(folder) == [10, 20.5]
    assert aside(folder) == [20, 30]
    save(folder, 30.5, 40.5)
    assert line(folder) == [10, 20.5, 30.5, 40.5]


def test_loading_alone_changes_nothing(folder: str) -> None:
    save(folder, 10, 20)
    save(folder, back_to=10)
    assert line(folder) == [10, 20]
    assert aside(folder) == []


def test_restore_returns_to_a_line_that_was_left(folder: str) -> None:
    save(folder, 10, 20, 30)
    save(folder, 15.5, 20.5, back_to=10)  # a second line from step 10
    save(folder, 17.25, back_to=15)  # a third, from 15 of the second
    assert line(folder) == [10, 15.5, 17.25]
    done = restore(folder, 30)
    assert list(done.set_aside) == ["step-00000015", "step-00000017"]
    assert sorted(done.brought_back.values()) == ["step-00000020", "step-00000030"]
    assert line(folder) == [10, 20, 30]
    (second,) = [name for name in lineage.aside_names(open_storage(folder)) if lineage.step_of_aside(name) == 20]
    restore(folder, second)
    assert line(folder) == [10, 15.5, 20.5]
    restore(folder, 17)
    assert line(folder) == [10, 15.5, 17.25]
    restore(folder, 10)
    assert line(folder) == [10]
    save(folder, 20.75)
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 31"):
        restore(folder, 31)
    assert line(folder) == [10, 20.75]


def test_lineage_does_not_depend_on_what_was_pruned(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40)
    save(tmp_path, 25.5, 35.5, back_to=20)
    restore(tmp_path, 40)
    for step in (20, 30):
        LocalStorage(str(tmp_path)).remove(f"step-{step:08d}")  # as retention does
    restore(tmp_path, 35)
    assert line(tmp_path) == [10, 25.5, 35.5]  # step 40 is of the other line, and 10 of both


def test_a_corrupt_head_is_set_aside_too(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    os.truncate(tmp_path / "step-00000020" / "state.json", 1)
    save(tmp_path, 15)
    assert line(tmp_path) == [10, 15]
    assert aside(tmp_path) == [20]


def test_a_new_run_in_an_old_directory_is_refused(folder: str) -> None:
    save(folder, 10, 20)
    with Checkpointer(folder) as ckpt:
        for step in (5, 10, 30):
            with pytest.raises(CheckpointError, match="newest is step-00000020, and this run has loaded none of them"):
                ckpt.save(step, state_of(1))
        assert line(folder) == [10, 20]
        ckpt.load(state_of(0))
        with pytest.raises(CheckpointError, match="step 15 comes before step 20, which this run loaded or saved last"):
            ckpt.save(15, state_of(1))
        ckpt.save(20, state_of(1))  # the step it loaded: not written again
        ckpt.save(30, state_of(30))
    assert line(folder) == [10, 20, 30]


def test_a_step_that_another_job_saved_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.load(state_of(0))
        save(tmp_path, 20)
        ckpt.save(15, state_of(15.5))  # the other's step is later than what this run goes on from
        assert aside(tmp_path) == [20]
        os.rename(tmp_path / lineage.aside_names(LocalStorage(str(tmp_path)))[0], tmp_path / "step-00000020")
        with pytest.raises(CheckpointError, match=r"20 exists, and is not what this run loaded or saved last"):
            ckpt.save(20, state_of(20.5))


def test_a_rewind_is_one_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two renames, readers see the line from before the branch, and the next job completes it."""
    save(tmp_path, 10, 20, 30)
    rename, left = LocalStorage.rename, [1]

    def some(self: LocalStorage, name: str, new: str) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        rename(self, name, new)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "rename", some)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 15.5, back_to=10)
    assert (tmp_path / ".moves").exists()
    assert (tmp_path / "step-00000030").exists()
    assert line(tmp_path) == [10]
    save(tmp_path, 12.5)
    assert not (tmp_path / ".moves").exists()
    assert line(tmp_path) == [10, 12.5]
    assert aside(tmp_path) == [20, 30]


def test_pins_follow_and_protect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 10, 20, 30)
    pin(tmp_path, 30, "spike")
    save(tmp_path, 30.5, back_to=10)
    names = lineage.aside_names(LocalStorage(str(tmp_path)))
    assert (tmp_path / "pins" / "spike").read_text().strip() == names[1]
    assert main(["ls", str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["step"], entry["set_aside"], entry["pins"]) for entry in listed] == [
        (10, False, []), (30, False, []), (20, True, []), (30, True, ["spike"]),
    ]  # fmt: skip
    assert list(plan_prune(tmp_path, Retention(keep_last=1)).remove) == ["step-00000010"]
    assert main(["prune", str(tmp_path), "--set-aside", "--dry-run"]) == 0
    assert f"{names[0]}  would be removed" in capsys.readouterr().out
    assert aside(tmp_path) == [20, 30]
    assert main(["prune", str(tmp_path), "--set-aside"]) == 0
    assert aside(tmp_path) == [30]
    assert main(["restore", str(tmp_path), "30"]) == 0
    assert "the next run resumes from step-00000030" in capsys.readouterr().out
    assert main(["unpin", str(tmp_path), "spike"]) == 0
    assert main(["pin", str(tmp_path), "10", "start"]) == 0
    capsys.readouterr()
    assert main(["ls", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "pinned as start" in shown
    assert "set aside as .aside-step-00000030-" in shown


def test_restore_of_what_is_not_there_or_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore", str(tmp_path / "none"), "1"]) == 1
    save(tmp_path, 10, 20)
    assert main(["restore", str(tmp_path), "7"]) == 1
    assert main(["restore", str(tmp_path), "step-00000010"]) == 1
    shown = capsys.readouterr().err
    assert "no such directory, or it is empty" in shown
    assert "holds no checkpoint of step 7" in shown
    assert "holds no 'step-00000010' that was set aside" in shown
    with Checkpointer(tmp_path) as ckpt:
        ckpt.acquire_lock()
        assert main(["restore", str(tmp_path), "10"]) == 1
    assert "is locked by another job" in capsys.readouterr().err
    save(tmp_path, 15.5, back_to=10)
    with pytest.raises(CheckpointError, match=r"It was set aside as \.aside-step-00000020-.*titan-ckpt restore"):
        Checkpointer(tmp_path).load(state_of(0), step=20)
