import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt_states import blank_state, flip_bit, make_state
from titan_ckpt import (
    Checkpointer,
    CheckpointError,
    KeepBest,
    Manifest,
    Retention,
    list_checkpoints,
    pin,
    plan_prune,
    unpin,
)
from titan_ckpt.format.manifest import read_manifest
from titan_ckpt.manage import retention


def save_each(folder: Path, keep_last: int | None, *steps: int) -> list[int]:
    ckpt = Checkpointer(folder, keep_last=keep_last)
    ckpt.load(blank_state())
    for step in steps:
        ckpt.save(step, make_state(step))
    ckpt.close()
    return [info.step for info in list_checkpoints(folder)]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert save_each(tmp_path, 2, 1, 2, 3, 4) == [3, 4]
    assert save_each(tmp_path, 1, 5) == [5]
    assert save_each(tmp_path, None, 6, 7) == [5, 6, 7]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "latest", "step-00000005", "step-00000006", "step-00000007",
    ]  # fmt: skip


def test_a_run_that_went_back_prunes_nothing_of_what_is_set_aside(tmp_path: Path) -> None:
    save_each(tmp_path, None, 10, 20, 100)
    flip_bit(tmp_path / "step-00000100" / "state.json")
    assert save_each(tmp_path, 1, 30) == [30]
    assert save_each(tmp_path, 1, 40) == [40]
    assert len(list(tmp_path.glob(".aside-step-00000100-*"))) == 1


def test_a_corrupt_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save_each(tmp_path, None, 1, 2, 3)
    os.truncate(tmp_path / "step-00000002" / "state.json", 1)
    assert save_each(tmp_path, 2, 4) == [2, 3, 4]
    assert save_each(tmp_path, 2, 5) == [2, 4, 5]


def test_what_is_not_a_checkpoint_is_never_removed(tmp_path: Path) -> None:
    save_each(tmp_path, None, 1, 2)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-2")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "mine")
    (tmp_path / ".staging-mine").mkdir()
    (tmp_path / "step-00000000").write_text("a file")
    save_each(tmp_path, 1, 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000000", "step-00000001", "step-2", "mine", ".staging-mine", "step-00000003", "latest",
    }  # fmt: skip


def test_leftovers_of_killed_runs_go_at_the_next_save(tmp_path: Path) -> None:
    for name in (".staging-step-00000009-0123abcd", ".removing-step-00000001-0123abcd"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "tensors-00000-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-latest-0123abcd").write_bytes(b"half")
    save_each(tmp_path, None, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "latest"}


def test_a_failure_to_clear_away_is_reported_but_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_each(tmp_path, None, 1, 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        assert 3 in save_each(tmp_path, 1, 3)
    assert "could not remove old checkpoints" in caplog.text
    assert "not yours" in caplog.text


def save_losses(folder: Path, losses: dict[int, float], **settings: Any) -> list[int]:
    """Each save in a run of its own: what is kept is decided from the disk."""
    for step, loss in losses.items():
        ckpt = Checkpointer(folder, **settings)
        ckpt.load(blank_state())
        ckpt.save(step, make_state(step), metrics={"loss": loss})
        ckpt.close()
    return [info.step for info in list_checkpoints(str(folder))]


def test_every_nth_step_is_kept_for_good(tmp_path: Path) -> None:
    assert save_losses(tmp_path, dict.fromkeys(range(1, 11), 0.0), keep_last=2, keep_every=4) == [4, 8, 9, 10]


def test_what_is_kept_for_good_is_not_read_at_each_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_each(tmp_path, None, *range(10, 90, 10), 95)
    read: list[str] = []

    def noted(storage: Any, name: str) -> Manifest:
        read.append(name)
        return read_manifest(storage, name)

    monkeypatch.setattr(retention, "read_manifest", noted)
    plan = plan_prune(str(tmp_path), Retention(keep_last=1, keep_every=20))
    assert list(plan.remove) == [f"step-{step:08d}" for step in (10, 30, 50, 70)]
    assert sorted(read) == [f"step-{step:08d}" for step in (10, 30, 50, 70, 95)]


def test_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5, 6: 9.0}
    best = KeepBest("loss", "min", 2)
    assert save_losses(tmp_path / "min", losses, keep_last=1, keep_best=best) == [2, 3, 6]
    assert save_losses(tmp_path / "max", losses, keep_last=1, keep_best=KeepBest("loss", "max")) == [6]
    assert save_losses(tmp_path / "alone", losses, keep_best=KeepBest("loss")) == [
        2,
        6,
    ]  # the newest stays all the same
    assert save_losses(tmp_path / "other", losses, keep_last=1, keep_best=KeepBest("accuracy")) == [6]


def test_what_is_pinned_is_kept_until_it_is_unpinned(tmp_path: Path) -> None:
    save_each(tmp_path, None, 1, 2, 3)
    pin(str(tmp_path), 1, "start")
    assert save_each(tmp_path, 1, 4) == [1, 4]
    pin(str(tmp_path), 4, "start")  # the name moves
    assert save_each(tmp_path, 1, 5) == [4, 5]
    unpin(str(tmp_path), "start")
    assert save_each(tmp_path, 1, 6) == [6]
    with pytest.raises(CheckpointError, match="has no pin 'start'; its pins: none"):
        unpin(str(tmp_path), "start")
    with pytest.raises(CheckpointError, match=r"step-00000009 has no manifest.json"):
        pin(str(tmp_path), 9, "start")
    for name in ("../up", "", "a/b", "x" * 200):
        with pytest.raises(CheckpointError, match="invalid pin name"):
            pin(str(tmp_path), 6, name)


def test_what_the_pointer_holds_is_kept(tmp_path: Path) -> None:
    save_each(tmp_path, None, 1, 2, 3)
    (tmp_path / "latest").write_text("step-00000001\n")
    assert list(plan_prune(str(tmp_path), Retention(keep_last=1)).remove) == ["step-00000002"]


def test_the_last_valid_one_is_never_removed(tmp_path: Path) -> None:
    save_each(tmp_path, None, 1, 2, 3)
    for step in (2, 3):
        os.truncate(tmp_path / f"step-0000000{step}" / "state.json", 1)
    plan = plan_prune(str(tmp_path), Retention(keep_last=1))
    assert not plan.remove
    assert plan.keep["step-00000001"] == ["is among the last 1"]
    (tmp_path / "latest").unlink()
    assert plan_prune(str(tmp_path), Retention(keep_last=1)).keep["step-00000002"] == ["is corrupt"]


def test_a_plan_deletes_nothing_and_gives_its_reasons(tmp_path: Path) -> None:
    save_losses(tmp_path, {step: float(-step) for step in range(1, 7)})
    before = sorted(tmp_path.rglob("*"))
    plan = plan_prune(str(tmp_path), Retention(2, 4, KeepBest("loss", "max")))
    assert sorted(tmp_path.rglob("*")) == before
    assert dict(plan.keep) == {
        "step-00000001": ["is best by loss"],
        "step-00000004": ["its step is a multiple of 4"],
        "step-00000005": ["is among the last 2"],
        "step-00000006": ["is among the last 2", "is what `latest` points to"],
    }
    sizes = {info.path[-13:]: info.manifest.nbytes for info in list_checkpoints(str(tmp_path))}
    assert dict(plan.remove) == {name: sizes[name] for name in ("step-00000002", "step-00000003")}


def test_invalid_settings_are_refused() -> None:
    for settings in ({"keep_last": 0}, {"keep_every": 0}, {"keep_best": KeepBest("x", count=0)}):
        with pytest.raises(CheckpointError, match="at least 1"):
            Retention(**settings)  # type: ignore[arg-type]


def test_a_removal_takes_the_validity_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_each(tmp_path, None, 1, 2)
    seen: list[list[int]] = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda *_, **__: seen.append([info.step for info in list_checkpoints(str(tmp_path))])
    )
    save_each(tmp_path, 1, 3)
    assert seen[0] == [2, 3]
