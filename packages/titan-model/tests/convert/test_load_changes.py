"""Loading with changes, folders that are something else, and a config that stays as it was built."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from model_families import FAMILIES, random_tokens
from titan_model import Decoder, WeightsError, build, load_huggingface, load_meta, save_huggingface
from titan_model.config import AttentionKind
from titan_model.convert.load_changes import LoadChanges

BOTH = ["llama", "qwen3-tied-scaled"]


@pytest.fixture
def saved(random_decoder: Callable[..., Decoder], tmp_path: Path) -> Callable[[str], tuple[Decoder, Path]]:
    def save(family: str) -> tuple[Decoder, Path]:
        model = random_decoder(FAMILIES[family])
        save_huggingface(model, tmp_path / family)
        return model, tmp_path / family

    return save


Saved = Callable[[str], tuple[Decoder, Path]]


@pytest.mark.parametrize("attention", get_args(AttentionKind))
def test_the_back_end_is_chosen_while_loading(saved: Saved, attention: AttentionKind) -> None:
    model, folder = saved("llama")
    loaded = load_huggingface(folder, attention=attention)
    assert loaded.config == replace(model.config, attention=attention)
    tokens = random_tokens(model.config)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_settings_that_do_not_follow_from_the_weights_are_changed(saved: Saved) -> None:
    changes: dict[str, Any] = {"norm": "fused_rmsnorm", "max_seq_len": 1000, "rope_theta": 5.0, "init_std": 0.5}
    _, folder = saved("llama")
    config = load_huggingface(folder, **changes).config
    assert {name: getattr(config, name) for name in changes} == changes
    _, folder = saved("qwen3-moe")
    model = load_huggingface(folder, balance_loss=0.5, balance_bias_rate=0.25, dtype=torch.bfloat16)
    assert model.config.moe is not None
    assert (model.config.moe.balance_loss, model.config.moe.balance_bias_rate) == (0.5, 0.25)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("router.bias")]
    assert biases
    assert all(bias.dtype == torch.float32 and not bias.any() for bias in biases)


def test_changes_of_what_the_weights_determine_are_refused_by_name(saved: Saved) -> None:
    model, folder = saved("llama")
    names = {*vars(model.config)} | {"anything"}
    for name in sorted(names - LoadChanges.__annotations__.keys()):
        with pytest.raises(ValueError, match=f"^{name}: the weights determine it.*attention, norm"):
            load_huggingface(folder, **{name: 3})  # type: ignore[arg-type]
    for name, value, said in (
        ("balance_loss", 0.1, "balance_loss: the model has no experts"),
        ("norm", "layernorm", "norm is 'layernorm', must be one of rmsnorm, fused_rmsnorm"),
        ("attention", "fast", "attention is 'fast'"),
        ("vocab_size", 0, "vocab_size is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            load_huggingface(folder, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("size", [1, 36, 37, 38, 64])
def test_the_vocabulary_is_padded_with_the_mean_row_or_cut(saved: Saved, family: str, size: int) -> None:
    model, folder = saved(family)
    loaded = load_huggingface(folder, vocab_size=size)
    assert loaded.config == replace(model.config, vocab_size=size)
    assert (loaded.head.weight is loaded.embed.weight) == model.config.tied_embeddings
    kept = min(size, 37)
    for mine, theirs in ((loaded.embed.weight, model.embed.weight), (loaded.head.weight, model.head.weight)):
        assert mine.shape == (size, 32)
        assert torch.equal(mine[:kept], theirs[:kept])
        torch.testing.assert_close(mine[37:], theirs.mean(0).expand(max(0, size - 37), -1))
    tokens = random_tokens(model.config) % kept
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens)[..., :kept], model(tokens)[..., :kept])
    loaded(tokens, labels=tokens).total.backward()


def test_the_config_of_a_model_cannot_be_replaced(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder()
    with pytest.raises(AttributeError, match=r"Decoder\.config cannot be replaced.*dataclasses\.replace"):
        model.config = replace(model.config, attention="sdpa")
    with pytest.raises(AttributeError):
        model.config.attention = "sdpa"  # type: ignore[misc]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config


def test_a_built_model_runs_unless_it_is_on_meta() -> None:
    tokens = random_tokens(FAMILIES["llama"])
    assert build(FAMILIES["llama"])(tokens).isfinite().all()
    with torch.device("meta"):
        assert build(FAMILIES["llama"]).embed.weight.is_meta
    assert build(FAMILIES["llama"], "meta").embed.weight.is_meta


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "hf://Qwen/Qwen3-0.6B", "https://huggingface.co/Qwen/Qwen3-0.6B/"])
def test_the_id_of_a_model_is_recognized(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"snapshot_download\('Qwen/Qwen3-0\.6B'\)"):
        load_huggingface(name)


def test_folders_that_hold_something_else_are_named_for_what_they_are(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved("llama")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder$"):
        load_huggingface(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"model\.safetensors is a file: give the folder"):
        load_huggingface(folder / "model.safetensors")

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-0.6B"}))
    for copied in (False, True):  # some tools copy the config of the model into the folder
        if copied:
            (adapter / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(WeightsError, match=r"an adapter .* of the model 'Qwen/Qwen3-0\.6B'.*merge_and_unload"):
            load_huggingface(adapter)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pointers_of_git_lfs_are_recognized(saved: Saved, name: str) -> None:
    _, folder = saved("llama")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
    (folder / name).write_text(pointer)
    with pytest.raises(WeightsError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_huggingface(folder)


def test_meta_folders_are_recognized_too(tmp_path: Path) -> None:
    config = FAMILIES["llama"]
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        load_meta("meta-llama/Llama-3.2-1B", config)
    (tmp_path / "params.json").write_text(json.dumps({"n_kv_heads": 2}))
    (tmp_path / "consolidated.00.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match=r"consolidated\.00\.pth is a Git LFS pointer"):
        load_meta(tmp_path, config)
