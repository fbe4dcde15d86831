import gc
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ckpt_states import blank_state, holds_step, make_state
from ckpt_victim import Victims, save_until_killed
from titan_ckpt import Checkpointer, CheckpointError, list_checkpoints
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.lock import DirectoryLock
from titan_ckpt.storage.open import open_storage


def storage_of(folder: Path) -> Storage:
    return open_storage(str(folder))


def write_lock(folder: Path, **changes: Any) -> dict[str, Any]:
    """As another job would have left it."""
    held = DirectoryLock(storage_of(folder))
    content = {**json.loads((folder / ".lock").read_text()), "token": "other", **changes}
    held.release()
    (folder / ".lock").write_text(json.dumps(content))
    return content


def test_the_second_job_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    victims = Victims(1, tmp_path, save_until_killed, folder, False)
    assert victims.progress(60)
    ckpt = Checkpointer(folder)
    for call in (ckpt.acquire_lock, lambda: ckpt.save(10**6, make_state(1))):
        with pytest.raises(CheckpointError) as error:
            call()
        message = str(error.value)
        assert f"{folder} is locked by another job: process {victims.processes[0].pid} on" in message
        assert "stop that job, or give this one another directory" in message
    assert ckpt.load({}) is not None  # to read is open to all
    victims.processes[0].kill()
    victims.end()
    ckpt.load({})
    ckpt.save(10**6, make_state(1))  # a killed job does not block others
    assert list_checkpoints(folder)[-1].step == 10**6


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_in_one_process(tmp_path: Path, asynchronous: bool) -> None:
    first, second = (Checkpointer(tmp_path, asynchronous=asynchronous) for _ in range(2))
    first.save(1, make_state(1))
    with pytest.raises(CheckpointError, match=r"this process itself holds it: close\(\) its other"):
        second.save(2, make_state(2))
    first.close()
    assert not (tmp_path / ".lock").exists()
    second.load(blank_state())
    second.save(2, make_state(2))
    second.wait()
    del second  # given back with the object, too
    gc.collect()
    third = Checkpointer(tmp_path)
    third.load(blank_state())
    third.save(3, make_state(3))
    assert [info.step for info in list_checkpoints(tmp_path)] == [1, 2, 3]


def test_a_process_number_that_came_again_is_another_process(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=os.getpid(), started="12345")
    held = DirectoryLock(storage_of(tmp_path))
    content = json.loads((tmp_path / ".lock").read_text())
    assert content["token"] != "other"
    assert content["pid"] == os.getpid()
    assert content["started"] != "12345"
    held.release()
    assert not (tmp_path / ".lock").exists()


def test_a_dead_job_on_another_machine_is_watched_and_then_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lock(tmp_path, host="elsewhere")
    with caplog.at_level(logging.WARNING):
        held = DirectoryLock(storage_of(tmp_path), patience=0.3)
    assert "watching for 0 s for a heartbeat" in caplog.text
    assert "took over" in caplog.text
    held.confirm()
    held.release()


def test_a_live_job_on_another_machine_is_refused(tmp_path: Path) -> None:
    content = write_lock(tmp_path, host="elsewhere")
    beat = {**content, "beats": 5}
    timer = threading.Timer(0.2, lambda: storage_of(tmp_path).replace(".lock", json.dumps(beat).encode()))
    timer.start()
    with pytest.raises(CheckpointError, match=r"process .* on elsewhere"):
        DirectoryLock(storage_of(tmp_path), patience=20)
    timer.join()
    assert json.loads((tmp_path / ".lock").read_text())["beats"] == 5  # left alone


def test_the_holder_beats(tmp_path: Path) -> None:
    held = DirectoryLock(storage_of(tmp_path), beat=0.01)
    until = threading.Event()
    while json.loads((tmp_path / ".lock").read_text())["beats"] < 3:
        until.wait(0.01)
    held.release()
    assert not (tmp_path / ".lock").exists()


def test_a_job_that_lost_the_lock_publishes_nothing(tmp_path: Path) -> None:
    """As after a long pause in which another machine took the job for dead."""
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, make_state(1))
    content = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps({**content, "token": "other", "host": "elsewhere"}))
    with pytest.raises(CheckpointError, match=r"another job took the lock .* on elsewhere"):
        ckpt.save(2, make_state(2))
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]
    ckpt.close()
    assert (tmp_path / ".lock").exists()  # it is the other's


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "5", '"x"', "[" * 100_000, " " * 100_000])
def test_a_damaged_lock_is_replaced_at_once(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It names no holder, so there is nobody to wait for: with the usual patience this would take 35 s."""
    (tmp_path / ".lock").write_text(content)
    with caplog.at_level(logging.WARNING):
        held = DirectoryLock(storage_of(tmp_path), patience=0.01)
    assert [record.message for record in caplog.records] == [f"{tmp_path}/.lock was damaged: replaced"]
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    held.release()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("pid", [-1, 0, 1 << 40, 10**300, "1", None, 1.5, True, [1]])
def test_a_process_number_that_is_none_is_of_no_process(pid: Any, tmp_path: Path) -> None:
    write_lock(tmp_path, pid=pid, started=None if pid != 1 else "x")
    DirectoryLock(storage_of(tmp_path)).release()


def test_a_lock_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".lock").mkdir()
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path, keep_last=1) as ckpt:
        for step in range(1, 4):
            ckpt.save(step, make_state(step))
    (warning,) = [record.message for record in caplog.records]
    assert "goes on without a lock" in warning
    assert sorted(os.listdir(tmp_path)) == [".lock", "latest", "step-00000003"]


def test_a_deleted_lock_is_written_again(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, make_state(1))
    (tmp_path / ".lock").unlink()
    ckpt.save(2, make_state(2))
    state = blank_state()
    ckpt.load(state)
    assert holds_step(state, 2)
    assert (tmp_path / ".lock").exists()
