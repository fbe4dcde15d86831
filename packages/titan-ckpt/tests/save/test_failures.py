"""Disks that are full or cannot be written, and what happens to training then."""

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ckpt_states import Held, blank_state, holds_step, make_state
from titan_ckpt import Checkpointer, CheckpointError, list_checkpoints, verify
from titan_ckpt.storage import local


class SmallDisk:
    """Allows a number of bytes to be written, then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 1 << 40
        write = os.pwrite

        def limited(handle: int, content: memoryview, at: int) -> int:
            if self.left <= 0:
                raise OSError(28, "No space left on device")
            count = write(handle, content[: self.left], at)
            self.left -= count
            return count

        monkeypatch.setattr(os, "pwrite", limited)


def save_and_wait(ckpt: Checkpointer, step: int) -> None:
    ckpt.save(step, make_state(step))
    ckpt.wait()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_at_any_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    disk = SmallDisk(monkeypatch)
    measure = Checkpointer(tmp_path / "measure")
    ckpt = Checkpointer(tmp_path / "checkpoints", asynchronous=asynchronous)
    for step in (1, 2, 3):
        measure.save(step, make_state(step))
    for step in (1, 2):
        ckpt.save(step, make_state(step))
    ckpt.wait()
    size = sum(path.stat().st_size for path in (tmp_path / "measure" / "step-00000003").iterdir())
    folder = tmp_path / "checkpoints"
    for room in (0, 1, 100, size // 2, size - 1000, size - 100, size - 1):
        disk.left = room
        with pytest.raises(CheckpointError, match=r"step 3 was not saved: .*No space left on device"):
            save_and_wait(ckpt, 3)
        disk.left = 1 << 40
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "latest", "step-00000001", "step-00000002"]
        state = blank_state()
        found = ckpt.load(state)
        assert found is not None
        assert holds_step(state, 2)
    disk.left = size  # enough for the checkpoint, not for the pointer
    ckpt.save(3, make_state(3))
    ckpt.wait()
    assert (folder / "latest").read_text() == "step-00000002\n"
    disk.left = 1 << 40
    state = blank_state()
    ckpt.load(state, step=3)
    assert holds_step(state, 3)
    ckpt.close()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of 4 MiB of its own; mounting takes root."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("cannot mount a file system here")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


def test_a_real_disk_that_is_full(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=4m")
    ckpt = Checkpointer(place / "checkpoints")
    small = {"model": Held(w=torch.ones(100_000))}
    ckpt.save(1, small)
    with pytest.raises(CheckpointError, match="No space left on device"):
        ckpt.save(2, {"model": Held(w=torch.ones(1_000_000))})
    ckpt.save(3, small)  # what the failed save had taken is free again
    ckpt.close()
    assert [info.step for info in list_checkpoints(str(place / "checkpoints"))] == [1, 3]
    assert all(verify(info.path, level="checksum") == [] for info in list_checkpoints(str(place / "checkpoints")))


def test_a_folder_that_cannot_be_written(tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=4m")
    ckpt = Checkpointer(place)
    ckpt.save(1, make_state(1))
    ckpt.close()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    ckpt = Checkpointer(place)
    state = blank_state()
    assert ckpt.load(state) is not None  # reading needs no right to write
    assert holds_step(state, 1)
    with pytest.raises(CheckpointError, match=f"could not lock {place}: OSError: .*Read-only file system"):
        ckpt.save(2, make_state(2))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_may_go_on_after_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    disk = SmallDisk(monkeypatch)
    ckpt = Checkpointer(tmp_path, asynchronous=asynchronous, on_save_error="warn")
    ckpt.save(1, make_state(1))
    ckpt.wait()
    disk.left = 0
    ckpt.save(2, make_state(2))
    ckpt.wait()
    assert "step 2 was not saved" in caplog.text
    assert "training continues" in caplog.text
    with pytest.raises(CheckpointError, match="which has no state_dict"):
        ckpt.save(3, {"model": object()})  # type: ignore[dict-item]
    disk.left = 1 << 40
    ckpt.save(3, make_state(3))
    ckpt.close()
    assert [info.step for info in list_checkpoints(str(tmp_path))] == [1, 3]


def test_a_pointer_that_cannot_be_moved_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(local.LocalStorage, "replace", refuse)
    with caplog.at_level(logging.WARNING):
        Checkpointer(tmp_path).save(1, make_state(1))
    assert "could not update" in caplog.text
    assert [info.step for info in list_checkpoints(str(tmp_path))] == [1]


def test_everything_is_synced_before_it_is_published_and_the_pointer_moves_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would lose cannot be tested here; the order of the calls can."""
    calls: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(handle: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        rename(source, target)

    def replaced(source: Path, target: Path) -> None:
        calls.append(("replace", Path(target).name))
        replace(source, target)

    ckpt = Checkpointer(tmp_path)
    ckpt.acquire_lock()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    ckpt.save(1, make_state(1))
    staging = calls[3][1]
    assert staging.startswith(".staging-step-00000001-")
    assert calls[:6] == [
        ("sync", "tensors-00000-of-00001.safetensors"),
        ("sync", "state.json"),
        ("sync", "manifest.json"),
        ("sync", staging),
        ("rename", "step-00000001"),
        ("sync", tmp_path.name),
    ]
    assert [name for what, name in calls[6:] if what == "replace"] == ["latest"]
    ckpt.close()
