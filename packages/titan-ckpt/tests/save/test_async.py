import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_states import Held, blank_state, holds_step, make_state
from titan_ckpt import Checkpointer, CheckpointError, checkpointer, list_checkpoints


class Gate:
    """Holds the writer back until opened, and can make it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.fail = False
        self.threads: list[str] = []
        write = checkpointer.write_file

        def gated(*args: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            assert self.open.wait(20)
            if self.fail:
                raise OSError(28, "No space left on device")
            return write(*args)

        monkeypatch.setattr(checkpointer, "write_file", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_the_snapshot_is_immune_to_what_comes_after(tmp_path: Path, gate: Gate) -> None:
    ckpt = Checkpointer(tmp_path, asynchronous=True)
    state = make_state(4)
    ckpt.save(4, state)
    with torch.no_grad():
        state["model"].state["weight"].zero_()
        state["model"].state["nested"]["bias"].add_(1)
    state["data"].state["position"] = 99
    state["model"].state["nested"]["new"] = 1
    gate.open.set()
    ckpt.wait()
    got = blank_state()
    ckpt.load(got)
    assert holds_step(got, 4)
    ckpt.close()


def test_save_returns_before_it_is_written_and_one_is_in_flight(tmp_path: Path, gate: Gate) -> None:
    ckpt = Checkpointer(tmp_path, asynchronous=True)
    ckpt.save(1, make_state(1))
    assert list_checkpoints(tmp_path) == []
    done = []
    second = threading.Thread(target=lambda: done.append(ckpt.save(2, make_state(2))))
    second.start()
    time.sleep(0.2)
    assert not done  # it waits for the first
    gate.open.set()
    second.join(20)
    assert [info.step for info in list_checkpoints(tmp_path)][:1] == [1]
    ckpt.close()
    assert [info.step for info in list_checkpoints(tmp_path)] == [1, 2]
    assert len(gate.threads) == 2
    assert all(name.startswith("titan-ckpt") for name in gate.threads)


@pytest.mark.parametrize("surfaces_at", ["save", "wait", "close", "load"])
def test_a_failure_surfaces_once_at_the_next_call(tmp_path: Path, gate: Gate, surfaces_at: str) -> None:
    gate.open.set()
    ckpt = Checkpointer(tmp_path, asynchronous=True)
    ckpt.save(1, make_state(1))
    ckpt.wait()
    gate.fail = True
    ckpt.save(2, make_state(2))
    calls = {
        "save": lambda: ckpt.save(3, make_state(3)),
        "wait": ckpt.wait,
        "close": ckpt.close,
        "load": lambda: ckpt.load(blank_state()),
    }
    with pytest.raises(CheckpointError, match=r"step 2 was not saved: could not write the tensors .*No space left"):
        calls[surfaces_at]()
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]
    assert not list(tmp_path.glob(".staging*"))
    gate.fail = False
    if surfaces_at != "close":
        ckpt.save(3, make_state(3))
    ckpt.close()
    state = blank_state()
    found = Checkpointer(tmp_path).load(state)
    assert found is not None
    assert holds_step(state, found.step)
    assert found.step == (1 if surfaces_at == "close" else 3)


def test_when_synchronous_it_fails_at_once_in_the_callers_thread(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    gate.fail = True
    ckpt = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="No space left"):
        ckpt.save(1, make_state(1))
    assert gate.threads == [threading.current_thread().name]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    ckpt.wait()


def test_close_waits_for_the_save_in_flight(tmp_path: Path, gate: Gate) -> None:
    ckpt = Checkpointer(tmp_path, asynchronous=True)
    ckpt.save(1, make_state(1))
    threading.Timer(0.2, gate.open.set).start()
    ckpt.close()
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]


def test_what_is_not_writable_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not lock .*file"):
        Checkpointer(tmp_path / "file").save(1, make_state(1))


def test_host_memory_is_one_copy_and_is_reused(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path, asynchronous=True)
    state = {"model": Held(a=torch.ones(1000), b=torch.ones(3, dtype=torch.bfloat16))}
    places = set()
    for step in (1, 2, 3):
        ckpt.save(step, state)
        ckpt.wait()
        assert 4006 <= ckpt._buffer.nbytes <= 4096  # whole pages
        places.add(ckpt._buffer.bytes_at(0, 1).ctypes.data)
    assert len(places) == 1
    state["model"].state["c"] = torch.arange(5000.0)  # it grows with the state
    ckpt.save(4, state)
    got = {"model": Held(a=torch.zeros(1000), b=torch.zeros(3, dtype=torch.bfloat16), c=torch.zeros(5000))}
    ckpt.load(got)
    assert torch.equal(got["model"].state["c"], torch.arange(5000.0))
    ckpt.close()
    assert ckpt._buffer.nbytes == 0


def test_a_state_that_changes_its_structure_is_planned_again(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        ckpt = Checkpointer(tmp_path / str(asynchronous), asynchronous=asynchronous)
        for step, shape in enumerate(((3,), (3,), (4, 2), ()), 1):
            ckpt.save(step, {"model": Held(w=torch.full(shape, float(step)))})
        for step, shape in enumerate(((3,), (3,), (4, 2), ()), 1):
            state = {"model": Held(w=torch.zeros(shape))}
            ckpt.load(state, step=step)
            assert (state["model"].state["w"] == step).all()
        ckpt.close()


@pytest.mark.parametrize("asynchronous", ["thread", 1, None])
def test_asynchronous_is_true_or_false(tmp_path: Path, asynchronous: Any) -> None:
    with pytest.raises(CheckpointError, match=r"asynchronous must be True or False, not"):
        Checkpointer(tmp_path, asynchronous=asynchronous)
