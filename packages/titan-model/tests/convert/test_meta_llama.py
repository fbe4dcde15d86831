"""Meta's original Llama files: held against an attention that turns neighboring pairs, and against transformers."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_families import FAMILIES, assert_same_logits, random_tokens, to_transformers, transformers_model
from titan_model import DecoderConfig, Llama3Scaling, preset, preset_names
from titan_model.convert.errors import WeightsError
from titan_model.convert.meta_llama import load_meta, meta_map

CONFIGS = {name: FAMILIES[name] for name in ("llama", "llama-tied-scaled")}


def meta_logits(tensors: dict[str, Tensor], config: DecoderConfig, tokens: Tensor) -> Tensor:
    """Return the logits of a Llama by Meta's formulas, written out with complex numbers and neighboring pairs."""
    batch, length = tokens.shape
    head_dim = config.dim // config.n_heads
    frequencies = config.rope_theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    if config.rope_scaling is not None:
        frequencies = torch.tensor([stretched(f, config.rope_scaling) for f in frequencies.tolist()]).double()
    angles = torch.outer(torch.arange(length).double(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)  # [S, Dh / 2]
    hidden_mask = torch.full((length, length), -math.inf).triu(1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weight

    def turn(x: Tensor) -> Tensor:  # [B, S, H, Dh], neighbors are real and imaginary part
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(3)

    x = tensors["tok_embeddings.weight"][tokens]
    for layer in range(config.n_layers):
        w = {
            key.removeprefix(f"layers.{layer}."): t for key, t in tensors.items() if key.startswith(f"layers.{layer}.")
        }
        y = norm(x, w["attention_norm.weight"])
        q = turn((y @ w["attention.wq.weight"].T).view(batch, length, config.n_heads, head_dim))
        k = turn((y @ w["attention.wk.weight"].T).view(batch, length, config.n_kv_heads, head_dim))
        v = (y @ w["attention.wv.weight"].T).view(batch, length, config.n_kv_heads, head_dim)
        repeats = config.n_heads // config.n_kv_heads
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim) + hidden_mask
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ w["attention.wo.weight"].T
        y = norm(x, w["ffn_norm.weight"])
        gated = F.silu(y @ w["feed_forward.w1.weight"].T) * (y @ w["feed_forward.w3.weight"].T)
        x = x + gated @ w["feed_forward.w2.weight"].T
    return norm(x, tensors["norm.weight"]) @ tensors["output.weight"].T


def stretched(frequency: float, scaling: Llama3Scaling) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_context / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_context / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def meta_weights(config: DecoderConfig) -> dict[str, Tensor]:
    """Return random weights under Meta's names, large enough for every part to matter."""
    generator = torch.Generator().manual_seed(5)
    kv_dim = config.n_kv_heads * config.dim // config.n_heads
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, config.dim), "norm": (config.dim,)}
    for layer in range(config.n_layers):
        shapes |= {
            f"layers.{layer}.attention_norm": (config.dim,),
            f"layers.{layer}.attention.wq": (config.dim, config.dim),
            f"layers.{layer}.attention.wk": (kv_dim, config.dim),
            f"layers.{layer}.attention.wv": (kv_dim, config.dim),
            f"layers.{layer}.attention.wo": (config.dim, config.dim),
            f"layers.{layer}.ffn_norm": (config.dim,),
            f"layers.{layer}.feed_forward.w1": (config.ffn_dim, config.dim),
            f"layers.{layer}.feed_forward.w2": (config.dim, config.ffn_dim),
            f"layers.{layer}.feed_forward.w3": (config.ffn_dim, config.dim),
        }
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    head = torch.randn(config.vocab_size, config.dim, generator=generator) * 0.2
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone() if config.tied_embeddings else head
    tensors["rope.freqs"] = torch.ones(config.dim // config.n_heads // 2)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], config: DecoderConfig, parts: int = 1, **params: Any) -> None:
    """Write a folder as Meta did, split for several devices: `embeddings` by rows or, in Llama 2, by columns."""
    columns = params.pop("embeddings_by_columns", False)
    by_columns = re.compile(r".*\.(wo|w2)\.weight" + (r"|tok_embeddings\.weight" if columns else ""))
    whole = re.compile(r"(.*norm)\.weight|rope\.freqs")
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        split = {
            name: tensor
            if whole.fullmatch(name)
            else tensor.chunk(parts, dim=1 if by_columns.fullmatch(name) else 0)[part].clone()
            for name, tensor in tensors.items()
        }
        torch.save(split, folder / f"consolidated.{part:02}.pth")
    described = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 16,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
    }
    (folder / "params.json").write_text(json.dumps({**described, **params}))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_meta_files_and_decoder_and_transformers_agree(tmp_path: Path, name: str, heads: int) -> None:
    config = replace(CONFIGS[name], n_kv_heads=heads)
    tensors = meta_weights(config)
    write(tmp_path, tensors, config)
    ours = load_meta(tmp_path, config)
    assert (ours.head.weight is ours.embed.weight) == config.tied_embeddings
    tokens = random_tokens(config)
    with torch.no_grad():
        reference = meta_logits(tensors, config, tokens)
        assert_same_logits(ours(tokens), reference)
    pytest.importorskip("transformers")
    theirs = transformers_model(config)
    theirs.load_state_dict(to_transformers(dict(ours.state_dict()), config), strict=False)
    with torch.no_grad():
        assert_same_logits(theirs(tokens, use_cache=False).logits, reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_way_back_gives_metas_tensors(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    tensors = meta_weights(config)
    write(tmp_path, tensors, config)
    internal = load_meta(tmp_path, config).state_dict()
    back: dict[str, Tensor] = {}
    for rule in meta_map(config).rules:
        back |= rule.to_external({key: internal[key] for key in rule.internal})
    assert back.keys() | {"output.weight", "rope.freqs"} == tensors.keys()
    for key, tensor in back.items():
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize("by_columns", [False, True], ids=["llama3", "llama2"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_put_together(tmp_path: Path, name: str, parts: int, by_columns: bool) -> None:
    config = replace(CONFIGS[name], vocab_size=36)  # a multiple of the number of parts
    tensors = meta_weights(config)
    write(tmp_path / "whole", tensors, config)
    write(tmp_path / "parts", tensors, config, parts, embeddings_by_columns=by_columns)
    whole, joined = load_meta(tmp_path / "whole", config), load_meta(tmp_path / "parts", config)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, joined.state_dict()[key]), key


def test_dtype_is_that_of_the_files_or_as_asked(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    write(tmp_path, {name: tensor.bfloat16() for name, tensor in meta_weights(config).items()}, config)
    assert {parameter.dtype for parameter in load_meta(tmp_path, config).parameters()} == {torch.bfloat16}
    wide = load_meta(tmp_path, config, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


def test_params_as_llama_2_has_them_are_read(tmp_path: Path) -> None:
    config = replace(CONFIGS["llama"], n_kv_heads=4)
    write(tmp_path, meta_weights(config), config)
    values = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "multiple_of": 16, "norm_eps": 1e-3}
    (tmp_path / "params.json").write_text(json.dumps(values))
    load_meta(tmp_path, config)


def test_params_of_another_model_are_refused_with_every_difference(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    write(tmp_path, meta_weights(config), config, n_layers=3, rope_theta=5e5, use_scaled_rope=True)
    with pytest.raises(ValueError, match=r"params\.json contradicts the config") as caught:
        load_meta(tmp_path, config)
    for said in (
        "n_layers is 3, the config has 2",
        "rope_theta is 500000.0, the config has 10000.0",
        "use_scaled_rope is True, the config has False",
    ):
        assert said in str(caught.value)


def test_one_error_lists_all_tensors_that_do_not_fit(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    tensors = meta_weights(config)
    del tensors["layers.1.attention.wq.weight"]
    tensors["layers.0.attention.wq.bias"] = torch.zeros(32)
    tensors["layers.0.feed_forward.w1.weight"] = torch.zeros(40, 32)
    write(tmp_path, tensors, config)
    with pytest.raises(WeightsError) as caught:
        load_meta(tmp_path, config)
    assert str(caught.value).splitlines()[1:] == [
        "  missing (1): layers.1.attention.wq.weight [32, 32]",
        "  unexpected (1): layers.0.attention.wq.bias [32]",
        "  wrong shape (1): layers.0.feed_forward.w1.weight is [40, 32], must be [48, 32]",
    ]


def test_a_part_that_is_missing_or_of_another_model_is_noticed(tmp_path: Path) -> None:
    config = replace(CONFIGS["llama"], vocab_size=36)
    tensors = meta_weights(config)
    write(tmp_path, tensors, config, parts=4)
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(WeightsError, match=r"wrong shape .*tok_embeddings\.weight is \[27, 32\], must be \[36, 32\]"):
        load_meta(tmp_path, config)
    torch.save({"tok_embeddings.weight": torch.zeros(9, 32)}, tmp_path / "consolidated.02.pth")
    with pytest.raises(WeightsError, match=r"consolidated\.02\.pth \(compared with consolidated\.00\.pth\)"):
        load_meta(tmp_path, config)


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self.path), "w"))


def test_code_in_the_files_is_not_run(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    write(tmp_path, meta_weights(config), config)
    torch.save({"norm.weight": Hostile(tmp_path / "ran")}, tmp_path / "consolidated.00.pth")
    with pytest.raises(WeightsError, match=r"consolidated\.00\.pth: unreadable, or contains objects other"):
        load_meta(tmp_path, config)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_or_damaged_is_said(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    with pytest.raises(FileNotFoundError, match=r"does not contain a Llama model in Meta\'s original format"):
        load_meta(tmp_path, config)
    write(tmp_path, meta_weights(config), config)
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="unreadable"):
        load_meta(tmp_path, config)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="must contain a dict of tensors"):
        load_meta(tmp_path, config)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no consolidated"):
        load_meta(tmp_path, config)


def test_models_that_are_not_llama_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot represent this model") as caught:
        meta_map(replace(FAMILIES["qwen3-moe"], norm="layernorm"))
    for said in ("norm is 'layernorm'", "qk_norm is set", "moe is set", "head_dim is 12"):
        assert said in str(caught.value)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("llama")])
def test_params_give_the_feed_forward_its_width(name: str) -> None:
    config = preset(name)
    params = meta_map(config).config
    # As the reference code computes it.
    hidden = int(2 * (4 * params["dim"]) / 3)
    hidden = int(params["ffn_dim_multiplier"] * hidden)
    hidden = params["multiple_of"] * ((hidden + params["multiple_of"] - 1) // params["multiple_of"])
    assert hidden == config.ffn_dim
