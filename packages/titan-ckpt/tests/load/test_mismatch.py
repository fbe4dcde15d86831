from pathlib import Path

import pytest
import torch

from ckpt_states import Held
from titan_ckpt import Checkpointer, CheckpointError


def test_all_differences_are_reported_at_once_and_nothing_is_changed(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    saved = {f"w{place}": torch.ones(2, place + 1) for place in range(6)}
    ckpt.save(1, {"model": Held(**saved), "other": Held(x=torch.ones(1)), "data": Held(position=3)})

    wanted = {f"w{place}": torch.zeros(2, place + 1) for place in range(2, 6)}
    wanted |= {"w2": torch.zeros(3, 2), "w3": torch.zeros(2, 4, dtype=torch.float64), "new/one": torch.zeros(1)}
    state = {"model": Held(**wanted), "data": Held(), "optimizer": Held(x=torch.zeros(1)), "loader": Held(at=0)}
    with pytest.raises(CheckpointError) as error:
        ckpt.load(state)
    message = str(error.value)
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert "step-00000001: the checkpoint does not match the state to load into" in message.splitlines()[0]
    assert lines == [
        "missing in the checkpoint (3):",
        "loader (the entire entry)",
        "model/new~1one",
        "optimizer (the entire entry)",
        "unexpected, in the checkpoint but not asked for (2):",
        "model/w0",
        "model/w1",
        "of another shape or dtype (2):",
        "model/w2: float32 [2, 3] in the checkpoint, float32 [3, 2] asked for",
        "model/w3: float32 [2, 4] in the checkpoint, float64 [2, 4] asked for",
    ]
    assert all(not tensor.any() for tensor in wanted.values())
    assert state["data"].state == {}


def test_a_tensor_where_a_number_was(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, {"optimizer": Held(lr=0.1, w=torch.ones(1))})
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint \(1\):\n    optimizer/lr"):
        ckpt.load({"optimizer": Held(lr=torch.tensor(0.1), w=torch.ones(1))})


def test_an_entry_may_hold_nothing(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, {"nothing": Held(), "tensors": Held(w=torch.ones(1))})
    state = {"nothing": Held(x=1), "tensors": Held(w=torch.zeros(1))}
    ckpt.load(state)
    assert state["nothing"].state == {}
    assert state["tensors"].state == {"w": torch.ones(1)}


def test_a_newer_one_that_does_not_fit_does_not_fall_back_to_an_older(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, {"model": Held(w=torch.ones(1))})
    ckpt.save(2, {"model": Held(w=torch.ones(2))})
    with pytest.raises(CheckpointError, match="step-00000002"):
        ckpt.load({"model": Held(w=torch.ones(1))})
