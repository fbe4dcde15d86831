import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt_states import blank_state, flip_bit, make_state
from titan_ckpt import Checkpointer, list_checkpoints


def save_each(folder: Path, keep_last: int | None, *steps: int) -> list[int]:
    ckpt = Checkpointer(folder, keep_last=keep_last)
    for step in steps:
        ckpt.save(step, make_state(step))
    return [info.step for info in list_checkpoints(folder)]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert save_each(tmp_path, 2, 1, 2, 3, 4) == [3, 4]
    assert save_each(tmp_path, 1, 5) == [5]
    assert save_each(tmp_path, None, 6, 7) == [5, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (5, 6, 7)]


def test_a_run_that_went_back_prunes_only_what_is_older(tmp_path: Path) -> None:
    save_each(tmp_path, None, 10, 20, 100)
    flip_bit(tmp_path / "step-00000100" / "state.json")
    found = Checkpointer(tmp_path).load(blank_state())
    assert found is not None
    assert found.step == 20
    assert save_each(tmp_path, 1, 30) == [30, 100]
    assert save_each(tmp_path, 1, 40) == [40, 100]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save_each(tmp_path, None, 1, 2, 3)
    os.truncate(tmp_path / "step-00000003" / "state.json", 1)
    assert save_each(tmp_path, 2, 4) == [2, 3, 4]


def test_what_is_no_checkpoint_is_never_removed(tmp_path: Path) -> None:
    save_each(tmp_path, None, 1, 2)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-2")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "mine")
    (tmp_path / ".staging-mine").mkdir()
    (tmp_path / "step-00000000").write_text("a file")
    save_each(tmp_path, 1, 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000000", "step-00000001", "step-2", "mine", ".staging-mine", "step-00000003",
    }  # fmt: skip


def test_leftovers_of_killed_runs_go_at_the_next_save(tmp_path: Path) -> None:
    for name in (".staging-step-00000009-0123abcd", ".removing-step-00000001-0123abcd"):
        (tmp_path / name / "tensors").mkdir(parents=True)
        (tmp_path / name / "tensors" / "__0_0.distcp").write_bytes(b"half")
    save_each(tmp_path, None, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_failure_to_clear_away_is_told_but_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_each(tmp_path, None, 1, 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        assert 3 in save_each(tmp_path, 1, 3)
    assert "could not clear away old checkpoints" in caplog.text
    assert "not yours" in caplog.text
