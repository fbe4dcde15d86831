"""A weight map means the same to all who read it: a trained model, its export, transformers, and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import titan_ckpt
import titan_model
from ranks import Ranks
from titan_train.check import check, model_config
from titan_train.errors import ConfigError
from train_cases import tiny
from train_export import export_folder, trained_and_loaded_again

MOE = {"model__preset": "debug_moe", "moe__n_experts": "4", "moe__ffn_dim": "32", "moe__balance_bias_rate": "0"}
FAMILIES = {
    "llama": {"model__preset": "debug"},
    "llama3": {"model__preset": "debug_llama3"},
    "qwen3, tied": {"model__preset": "debug_qwen3", "model__tied_embeddings": "true"},
    "qwen3-moe": MOE,
    "qwen2": {"model__preset": "debug", "model__qkv_bias": "true"},
    "mistral": {"model__preset": "debug", "model__window": "8"},
    "granite": {
        "model__preset": "debug",
        "model__embedding_multiplier": "2",
        "model__residual_multiplier": "0.5",
        "model__logits_scaling": "4",
        "model__tied_embeddings": "true",
    },
    "llama, yarn": {
        "model__preset": "debug",
        "rope__type": "yarn",
        "rope__factor": "4",
        "rope__original_context": "8",
    },
}
EXPORTED = {"checkpoint__huggingface": "true", "training__steps": "2", "schedule__warmup_steps": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_exported_and_loaded_again(ranks2: Ranks, tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny(**(FAMILIES[family] | EXPORTED | {"run__folder": str(tmp_path)}))
    for new, filled, trained in ranks2.run(trained_and_loaded_again, config):
        assert new != trained
        assert filled == trained

    shape = model_config(config)
    model = titan_model.build(shape, "cpu")
    with titan_ckpt.open_checkpoint(tmp_path / "checkpoints/step-00000002") as checkpoint:
        state = {
            name.removeprefix("model/"): checkpoint.read(name)
            for name in checkpoint.tensors
            if name.startswith("model/")
        }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["head.weight"] if shape.tied_embeddings else [])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_folder(config)).eval()
    tokens = torch.randint(shape.vocab_size, (2, 16))
    with torch.no_grad():
        expected = model.eval()(tokens)
        assert torch.allclose(theirs(tokens, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)

    # As folders on the Hub have it: the copy of a tied weight, and a table that follows from the config.
    external = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("rotary")}
    external["model.rotary_emb.inv_freq"] = torch.ones(4)
    source = _Held(external)
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    titan_ckpt.load_into(blank, source, titan_model.huggingface_map(shape, fused_experts=_has_fused(external)))
    assert all(torch.equal(blank[name], tensor) for name, tensor in state.items())


class _Held:
    """A source of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.values = tensors, dict[str, object]()

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_slice(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        return self.tensors[name][tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]


def _has_fused(names: dict[str, torch.Tensor]) -> bool:
    return any(name.endswith("gate_up_proj") for name in names)


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
