"""What is taken when something is corrupt or absent; what is done with what was saved; how long to look takes."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from ckpt_states import Held, blank_state, flip_bit, holds_step, make_state
from titan_ckpt import Checkpointer, CheckpointError, list_checkpoints
from titan_ckpt.format import manifest

DATA = "tensors-00000-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ckpt = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        ckpt.save(step, make_state(step))
    ckpt.close()
    return tmp_path


def test_the_one_before_is_taken_if_the_policy_allows(folder: Path) -> None:
    flip_bit(folder / "step-00000003" / DATA)
    flip_bit(folder / "step-00000002" / "state.json")
    state = blank_state()
    with pytest.raises(CheckpointError, match=r"step-00000003 is corrupt: .*model/weight.* set on_corruption="):
        Checkpointer(folder).load(state, on_corruption="raise")
    found = Checkpointer(folder).load(state)
    assert found is not None
    assert holds_step(state, 1)
    assert list(found.skipped) == ["step-00000003", "step-00000002"]
    assert "model/weight" in found.skipped["step-00000003"][0]
    assert found.skipped["step-00000002"] == ["state.json does not match its checksum"]


def test_nothing_corrupt_reaches_a_tensor(folder: Path) -> None:
    """Pieces are checked before they are copied, and what is known before any is read leaves all untouched."""
    shutil.rmtree(folder / "step-00000001")
    shutil.rmtree(folder / "step-00000002")
    path = folder / "step-00000003"
    flip_bit(path / DATA)
    state = blank_state()
    for tensor in (state["model"].state["weight"], state["model"].state["nested"]["bias"]):
        tensor.fill_(7.0)
    with pytest.raises(CheckpointError, match="partially overwritten before corruption was detected; discard it"):
        Checkpointer(folder).load(state)
    assert (state["model"].state["weight"] == 7.0).all()
    assert torch.equal(state["model"].state["nested"]["bias"], make_state(3)["model"].state["nested"]["bias"])
    assert state["data"].state == {}

    state["model"].state["nested"]["bias"].fill_(7.0)
    os.truncate(path / DATA, 1000)
    with pytest.raises(CheckpointError) as error:
        Checkpointer(folder).load(state)
    assert "mixture" not in str(error.value)
    assert (state["model"].state["nested"]["bias"] == 7.0).all()


def test_corruption_in_what_is_not_asked_for_does_not_matter(folder: Path) -> None:
    flip_bit(folder / "step-00000003" / DATA)
    state = blank_state()
    found = Checkpointer(folder).load(state, only=["model/nested/*", "data/*"])
    assert found is not None
    assert found.step == 3


def test_a_resume_that_is_required_never_starts_from_scratch(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    assert Checkpointer(empty).load(blank_state()) is None
    with pytest.raises(
        CheckpointError, match=f"there is no checkpoint in {empty} to resume from: give the right directory"
    ):
        Checkpointer(empty).load(blank_state(), required=True)
    for step in (1, 2, 3):
        (folder / f"step-0000000{step}" / "manifest.json").unlink()
    for required in (False, True):
        with pytest.raises(CheckpointError, match="holds no valid checkpoint, only step-00000003, step-00000002"):
            Checkpointer(folder).load(blank_state(), required=required)


def test_an_exporter_sees_each_published_checkpoint(tmp_path: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    def export(path: str) -> None:
        state = blank_state()
        assert Checkpointer(Path(path).parent).load(state, step=int(path[-1])) is not None
        assert holds_step(state, int(path[-1]))
        seen.append((Path(path).name, sorted(os.listdir(tmp_path))))

    for asynchronous in (False, True):
        ckpt = Checkpointer(tmp_path, keep_last=1, asynchronous=asynchronous, exporters=[export])
        ckpt.load(blank_state())
        ckpt.save(3 + asynchronous, make_state(3 + asynchronous))
        ckpt.close()
    assert [name for name, _ in seen] == ["step-00000003", "step-00000004"]
    assert "step-00000003" in seen[1][1]  # not yet cleared away
    assert [info.step for info in list_checkpoints(str(tmp_path))] == [4]


def test_an_exporter_that_fails_is_reported_but_the_checkpoint_stands(tmp_path: Path) -> None:
    def export(path: str) -> None:
        raise OSError("no room for it")

    ckpt = Checkpointer(tmp_path, keep_last=1, exporters=[export])
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=f"finish after saving step {step}: OSError: no room for it"):
            ckpt.save(step, make_state(step))
    ckpt.close()
    assert [info.step for info in list_checkpoints(str(tmp_path))] == [2]


def test_starting_among_a_thousand_checkpoints_reads_but_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1000, make_state(1000))
    ckpt.close()
    for step in range(1000):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("{}")
    read: list[str] = []
    original = manifest.read_manifest

    def noted(storage: object, name: str) -> manifest.Manifest:
        read.append(name)
        return original(storage, name)  # type: ignore[arg-type]

    monkeypatch.setattr("titan_ckpt.load.loading.read_manifest", noted)
    state, started = blank_state(), time.perf_counter()
    found = Checkpointer(tmp_path).load(state)
    print(f"{time.perf_counter() - started:.3f} s")  # to see, not to judge by
    assert found is not None
    assert found.step == 1000
    assert read == ["step-00001000"]


def test_metrics_are_plain_numbers(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    for metrics in ({"loss": torch.tensor(1.0)}, {"loss": True}, {"loss": "low"}, {1: 1.0}):
        with pytest.raises(CheckpointError, match="metrics must be names and plain numbers"):
            ckpt.save(1, {"x": Held(y=1)}, metrics=metrics)  # type: ignore[arg-type]
