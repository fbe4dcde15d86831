"""A weight map means the same to the run that exports and to the packages that write and read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import titan_ckpt
import titan_model
from titan_train.check import check, model_config
from titan_train.errors import ConfigError
from train_cases import tiny

MOE = {"model__preset": "debug_moe", "moe__n_experts": "4", "moe__ffn_dim": "32", "moe__balance_bias_rate": "0"}
EXPORTED = {"checkpoint__huggingface": "true", "training__steps": "2", "schedule__warmup_steps": "0"}


class _Held:
    """A source of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.values = tensors, dict[str, object]()

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_slice(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        return self.tensors[name][tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]


def test_a_bias_that_cannot_be_exported_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tiny(**(MOE | EXPORTED | {"run__folder": str(tmp_path), "moe__balance_bias_rate": "0.01"}))
    with pytest.raises(ConfigError, match=r"layers\.\d\.ffn\.router\.bias.*set moe\.balance_bias_rate = 0"):
        check(config, 1)
    check(tiny(**(MOE | EXPORTED | {"run__folder": str(tmp_path)})), 1)


def test_a_bias_is_exported_while_it_is_zero_only(tmp_path: Path) -> None:
    """Without its rule an export would leave it out, and be another model."""
    shape = model_config(tiny(**MOE))
    assert shape.moe is not None
    biased = replace(shape, moe=replace(shape.moe, balance_bias_rate=0.01))
    weights = titan_model.huggingface_map(biased)
    state = titan_model.build(biased, "cpu").state_dict()
    for name, tensor in state.items():
        tensor.zero_() if name.endswith("bias") else tensor.normal_()
    titan_ckpt.export(_Held(state), tmp_path / "zero", weights, prefix="")
    blank = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    titan_ckpt.load_into(blank, titan_ckpt.open_source(tmp_path / "zero"), weights)
    assert all(torch.equal(blank[name], tensor) for name, tensor in state.items())
    state["layers.1.ffn.router.bias"][0] = 1.0
    with pytest.raises(titan_ckpt.CheckpointError, match=r"train with moe\.balance_bias_rate = 0"):
        titan_ckpt.export(_Held(state), tmp_path / "biased", weights, prefix="")
    with pytest.raises(titan_ckpt.CheckpointError, match="has no place for layers"):
        titan_ckpt.HuggingFaceExport(tmp_path, weights)
