import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_states import Held, blank_state, holds_step, make_state
from titan_ckpt import Checkpointer, CheckpointError, SaveEnd, list_checkpoints
from titan_ckpt.save import saving
from titan_ckpt.save.in_flight import Save
from titan_ckpt.storage import local


class Gate:
    """Holds the writer back until opened, and can make it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.fail = False
        self.threads: list[str] = []
        write = saving.write_file

        def gated(*args: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            assert self.open.wait(20)
            if self.fail:
                raise OSError(28, "No space left on device")
            return write(*args)

        monkeypatch.setattr(saving, "write_file", gated)


def save_and_wait(ckpt: Checkpointer, step: int) -> None:
    ckpt.save(step, make_state(step))
    ckpt.wait()


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


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Return what sends Ctrl-C in a moment; a background job of a shell ignores it otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_waiting_leaves_the_save_its_data(tmp_path: Path, gate: Gate, ctrl_c: Callable[[], None]) -> None:
    """The usual idiom: catch it, save what there is now. Step 1 must not be published with the values of step 2."""
    ckpt = Checkpointer(tmp_path, asynchronous=True)
    for step, wait in ((1, ckpt.wait), (3, lambda: ckpt.save(9, make_state(9))), (5, ckpt.close)):
        gate.open.clear()
        ckpt.save(step, make_state(step))
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            wait()
        assert ckpt.in_flight == step
        threading.Timer(0.2, gate.open.set).start()
        ckpt.save(step + 1, make_state(step + 1))
        ckpt.wait()
    ckpt.close()
    assert [info.step for info in list_checkpoints(tmp_path)] == [1, 2, 3, 4, 5, 6]
    for step in (1, 2, 3, 4, 5, 6):
        state = blank_state()
        Checkpointer(tmp_path).load(state, step=step)
        assert holds_step(state, step)


def test_the_end_of_a_save_is_reported(tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    ends: list[SaveEnd] = []

    def ended(end: SaveEnd) -> None:
        ends.append(end)
        assert ckpt.in_flight is None
        raise ValueError("a mistake in it")

    gate.open.set()
    for asynchronous in (False, True):
        with Checkpointer(tmp_path / str(asynchronous), asynchronous=asynchronous, on_save_end=ended) as ckpt:
            assert ckpt.in_flight is None
            gate.fail = False
            ckpt.save(1, make_state(1))
            ckpt.wait()
            gate.fail = True
            with pytest.raises(CheckpointError, match="No space left"):
                save_and_wait(ckpt, 2)
    assert [(end.step, Path(end.path).name) for end in ends] == [(1, "step-00000001"), (2, "step-00000002")] * 2
    assert [end.error is None for end in ends] == [True, False] * 2
    assert all(end.seconds > 0 for end in ends)
    assert "on_save_end failed after step 2: ValueError: a mistake in it" in caplog.text


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_takes_too_long_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """A slow storage is given up at the next write."""
    write = local._Sink.write

    def slow(self: local._Sink, content: bytes | memoryview) -> None:
        time.sleep(0.5)
        write(self, content)

    with Checkpointer(tmp_path, asynchronous=asynchronous, save_timeout=0.4) as ckpt:
        ckpt.acquire_lock()
        monkeypatch.setattr(local._Sink, "write", slow)
        with pytest.raises(CheckpointError, match=r"step 1 is not finished after 0\.4 s, the limit save_timeout"):
            save_and_wait(ckpt, 1)
        monkeypatch.undo()
        while ckpt.in_flight is not None:
            time.sleep(0.01)
        assert list_checkpoints(tmp_path) == []
        assert not list(tmp_path.glob(".staging*"))
        if asynchronous:  # the wait was given up first, then the save itself failed
            with contextlib.suppress(CheckpointError):
                ckpt.wait()


def test_a_storage_that_hangs_blocks_nobody_for_longer_than_the_limit(tmp_path: Path, gate: Gate) -> None:
    ckpt = Checkpointer(tmp_path, asynchronous=True, save_timeout=2.0)
    ckpt.save(1, make_state(1))
    for call in (ckpt.wait, lambda: ckpt.save(2, make_state(2)), lambda: ckpt.load(blank_state()), ckpt.close):
        with pytest.raises(CheckpointError, match="step 1 is not finished after"):
            call()
    assert ckpt.in_flight == 1
    gate.open.set()  # it returns after all: the save is late, and nothing of it is published
    while ckpt.in_flight is not None:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"step 1 was not saved: .*the limit save_timeout"):
        ckpt.wait()
    ckpt.save(2, make_state(2))
    ckpt.close()
    assert [info.step for info in list_checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_is_positive(tmp_path: Path, limit: float) -> None:
    with pytest.raises(CheckpointError, match="save_timeout must be a positive number of seconds or None"):
        Checkpointer(tmp_path, save_timeout=limit)


def test_a_fork_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = Checkpointer(tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for call in (ckpt.wait, lambda: ckpt.save(1, make_state(1)), lambda: ckpt.load(blank_state())):
        with pytest.raises(CheckpointError, match="of which this one is a fork: create another one here"):
            call()


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
        buffer = ckpt._flight.spare
        assert buffer is not None
        assert 4006 <= buffer.nbytes <= 4096  # whole pages
        places.add(buffer.bytes_at(0, 1).ctypes.data)
    assert len(places) == 1
    state["model"].state["c"] = torch.arange(5000.0)  # it grows with the state
    ckpt.save(4, state)
    got = {"model": Held(a=torch.zeros(1000), b=torch.zeros(3, dtype=torch.bfloat16), c=torch.zeros(5000))}
    ckpt.load(got)
    assert torch.equal(got["model"].state["c"], torch.arange(5000.0))
    ckpt.close()
    assert ckpt._flight.spare is None


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


def test_a_save_that_has_just_been_begun_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between taking its turn and the first line of its work, a save's thread may be held up for long."""
    held, go_on = threading.Event(), threading.Event()
    execute = Save._execute

    def late(self: Save) -> None:
        held.set()
        assert go_on.wait(20)
        execute(self)

    monkeypatch.setattr(Save, "_execute", late)
    with Checkpointer(tmp_path, asynchronous=True) as ckpt:
        ckpt.save(1, make_state(1))
        assert held.wait(20)
        assert ckpt.in_flight == 1
        threading.Timer(0.2, go_on.set).start()
        ckpt.wait()
        assert [info.step for info in list_checkpoints(tmp_path)] == [1]
    assert not (tmp_path / ".lock").exists()
