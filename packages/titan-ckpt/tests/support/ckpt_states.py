"""Things to save: a dict, a model, an optimizer; and what is done to checkpoints on the disk."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state


class Held:
    """A Stateful that is nothing but its dict. Loading keeps what was handed over."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class ModelState:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return dcp_state.get_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        dcp_state.set_model_state_dict(self.model, state)


class OptimizerState:
    _options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return dcp_state.get_optimizer_state_dict(self.model, self.optimizer, options=self._options)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        dcp_state.set_optimizer_state_dict(self.model, self.optimizer, state, options=self._options)


def make_model(seed: int) -> nn.Module:
    """Sizes that four ranks do not divide: the last bias leaves one rank with nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 7), nn.LayerNorm(7), nn.Linear(7, 6), nn.Linear(6, 3))


def make_state(step: int) -> dict[str, Held]:
    """What step `step` must hold, bit for bit."""
    weight = torch.arange(30_000, dtype=torch.float32).reshape(100, 300) / (step + 1)
    return {
        "model": Held(weight=weight, nested={"bias": torch.full((7,), step, dtype=torch.bfloat16)}),
        "data": Held(position=step, fraction=step / 3),
    }


def blank_state() -> dict[str, Held]:
    return {"model": Held(weight=torch.empty(100, 300), nested={"bias": torch.empty(7, dtype=torch.bfloat16)}),
            "data": Held()}  # fmt: skip


def holds_step(state: dict[str, Held], step: int) -> bool:
    wanted, got = make_state(step), {name: held.state for name, held in state.items()}
    return (
        torch.equal(got["model"]["weight"], wanted["model"].state["weight"])
        and torch.equal(got["model"]["nested"]["bias"], wanted["model"].state["nested"]["bias"])
        and got["data"] == wanted["data"].state
    )


def flip_bit(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)
