from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_states import Held
from titan_ckpt import Checkpointer, CheckpointError


@pytest.fixture
def ckpt(tmp_path: Path) -> Checkpointer:
    saved = Checkpointer(tmp_path)
    state = {
        "model": Held(layers={"0": torch.ones(2), "1": torch.ones(2)}, head=torch.ones(3)),
        "optimizer": Held(groups={"lr": 0.5, "betas": (0.8, 0.9)}, moment=torch.ones(2)),
        "data": Held(position=7),
    }
    saved.save(1, state)
    return saved


def blank() -> dict[str, Held]:
    return {
        "model": Held(layers={"0": torch.zeros(2), "1": torch.zeros(2)}, head=torch.zeros(3)),
        "optimizer": Held(groups={"lr": 0.1, "betas": (0.0, 0.0)}, moment=torch.zeros(2)),
        "data": Held(position=0),
    }


def flat(state: dict[str, Held]) -> dict[str, Any]:
    model, optimizer = state["model"].state, state["optimizer"].state
    return {
        "0": model["layers"]["0"].sum().item(),
        "1": model["layers"]["1"].sum().item(),
        "head": model["head"].sum().item(),
        "groups": optimizer["groups"],
        "moment": optimizer["moment"].sum().item(),
        "position": state["data"].state["position"],
    }


def test_only_what_matches_is_loaded(ckpt: Checkpointer) -> None:
    state = blank()
    found = ckpt.load(state, only=["model/layers/*", "optimizer/groups/lr"])
    assert found is not None
    assert (found.missing, found.unexpected) == ((), ())
    assert flat(state) == {
        "0": 2, "1": 2, "head": 0, "groups": {"lr": 0.5, "betas": (0.0, 0.0)}, "moment": 0, "position": 0,
    }  # fmt: skip


def test_what_is_frozen_keeps_its_value(ckpt: Checkpointer) -> None:
    state = blank()
    ckpt.load(state, frozen=["model/head", "data/*", "*/betas"])
    assert flat(state) == {
        "0": 2, "1": 2, "head": 0, "groups": {"lr": 0.5, "betas": (0.0, 0.0)}, "moment": 2, "position": 0,
    }  # fmt: skip


def test_an_entry_of_which_nothing_is_selected_is_left_alone(ckpt: Checkpointer) -> None:
    class Untouchable(Held):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    state = blank() | {"data": Untouchable(position=0)}
    ckpt.load(state, only=["model/*"])
    assert flat(state)["head"] == 3


def test_a_pattern_that_means_nothing_is_an_error(ckpt: Checkpointer) -> None:
    for settings in ({"only": ["modl/*"]}, {"frozen": ["head"]}):
        with pytest.raises(
            CheckpointError, match=r"the pattern '(modl/\*|head)' matches no name; names are, for example,"
        ):
            ckpt.load(blank(), **settings)  # type: ignore[arg-type]


def test_strict_tells_and_lenient_lists_exactly_what_differs(ckpt: Checkpointer) -> None:
    state = blank()
    del state["model"].state["head"]
    state["model"].state["new"] = torch.full((4,), 9.0)
    state["more"] = Held(x=torch.full((1,), 9.0))
    state["data"].state = {"position": 0, "epoch": 3}
    with pytest.raises(CheckpointError) as error:
        ckpt.load(state)
    assert all(name in str(error.value) for name in ("model/new", "model/head", "more (the entire entry)"))
    assert flat(state | {"model": Held(**state["model"].state, head=torch.zeros(3))})["0"] == 0

    found = ckpt.load(state, strict=False)
    assert found is not None
    assert found.missing == ("model/new", "more (the entire entry)")
    assert found.unexpected == ("model/head",)
    assert state["model"].state["new"].tolist() == [9.0] * 4
    assert state["more"].state["x"].tolist() == [9.0]
    assert state["model"].state["layers"]["0"].tolist() == [1.0, 1.0]
    assert state["data"].state == {"position": 7, "epoch": 3}


def test_strictness_counts_only_what_is_selected(ckpt: Checkpointer) -> None:
    state = {"model": Held(layers={"0": torch.zeros(2)}, other=torch.zeros(1))}
    assert ckpt.load(state, only=["model/layers/0"]) is not None
    assert state["model"].state["layers"]["0"].tolist() == [1.0, 1.0]
    with pytest.raises(CheckpointError, match=r"unexpected.*\n    model/layers/1"):
        ckpt.load(state, only=["model/layers/*"])


def test_another_shape_is_an_error_even_when_lenient(ckpt: Checkpointer) -> None:
    state = blank()
    state["model"].state["head"] = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"model/head: float32 \[3\] in the checkpoint, float32 \[4\] asked for"):
        ckpt.load(state, strict=False, cast=True)


def test_another_dtype_is_cast_on_request_alone(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    values = torch.randn(1000, dtype=torch.float64)
    ckpt.save(1, {"model": Held(w=values, n=torch.arange(5))})
    state = {"model": Held(w=torch.zeros(1000, dtype=torch.bfloat16), n=torch.zeros(5, dtype=torch.int32))}
    with pytest.raises(CheckpointError, match=r"model/w: float64 \[1000\] in the checkpoint, bfloat16"):
        ckpt.load(state)
    ckpt.load(state, cast=True)
    assert torch.equal(state["model"].state["w"], values.to(torch.bfloat16))
    assert state["model"].state["n"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(CheckpointError, match=r"model/w: float64 \[1000\] in the checkpoint, int64"):
        ckpt.load(
            {"model": Held(w=torch.zeros(1000, dtype=torch.int64), n=torch.zeros(5, dtype=torch.int64))}, cast=True
        )
