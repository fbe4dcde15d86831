"""Llama weights in Meta's original format: consolidated.*.pth, with other names and another rotary layout."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_model.config import DecoderConfig
from titan_model.convert.errors import WeightsError, check_shapes
from titan_model.convert.folders import check_downloaded, open_folder, read_json_object
from titan_model.convert.loading import TensorSource, external_shapes, load_mapped
from titan_model.convert.weight_map import DecoderWeightMap, InterleavedRotary, Rename, TensorRule
from titan_model.decoder import Decoder
from titan_model.rope_scalings import Llama3Scaling

_BLOCK = {
    "attn_norm": "attention_norm",
    "attn.v_proj": "attention.wv",
    "attn.o_proj": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn.gate_proj": "feed_forward.w1",
    "ffn.down_proj": "feed_forward.w2",
    "ffn.up_proj": "feed_forward.w3",
}


_NOT_IN_LLAMA = (
    "qkv_bias",
    "window",
    "rotary_fraction",
    "nope_layers",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)


def meta_map(config: DecoderConfig) -> DecoderWeightMap:
    """Return the weight map between a decoder and Meta's original format, with the `params.json`.

    A tied head is not stored; files that contain a copy of it are accepted (`aliases`). `params.json` records that
    rotary positions are scaled, but not by which factors.

    Args:
        config: The decoder's shape: a Llama 2, 3, 3.1 or 3.2.

    Raises:
        ValueError: If the config is not a Llama; the message lists every reason.
    """
    values = _params(config)
    rules: list[TensorRule] = [Rename(("embed.weight",), ("tok_embeddings.weight",))]
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}"
        rules += [
            InterleavedRotary(
                (f"{prefix}.attn.{kind}_proj.weight",),
                (f"{prefix}.attention.w{kind}.weight",),
                config.attention_head_dim,
            )
            for kind in "qk"
        ]
        rules += [Rename((f"{prefix}.{a}.weight",), (f"{prefix}.{b}.weight",)) for a, b in _BLOCK.items()]
    rules.append(Rename(("norm.weight",), ("norm.weight",)))
    if not config.tied_embeddings:
        rules.append(Rename(("head.weight",), ("output.weight",)))
    return DecoderWeightMap(
        rules=tuple(rules),
        config=values,
        aliases={"output.weight": "tok_embeddings.weight"} if config.tied_embeddings else {},
        ignored=(r"rope\.freqs",),  # rotary frequencies, stored as weights
    )


def load_meta(
    directory: str | os.PathLike[str],
    config: DecoderConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Build a decoder from a folder of Llama weights in Meta's original format.

    The parts of a model that was split for several devices are joined tensor by tensor. The files are memory-mapped and
    read without running any code in them.

    Args:
        directory: Folder with `consolidated.00.pth` and further parts, and `params.json`.
        config: The decoder's shape, for example `preset("llama3_8b")`. It supplies what `params.json` does not record:
            context length, factors of the rotary scaling, whether the head is tied.
        device: Device of the parameters.
        dtype: Dtype of the parameters; None keeps that of the files or, if they mix several, takes the smallest that
            holds all their values.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `params.json` contradicts the config; the message lists every contradiction.
        WeightsError: If tensors are missing, unexpected or of the wrong shape; the message lists all of them.
    """
    directory = open_folder(directory)
    weights = meta_map(config)
    _check_params(read_json_object(directory / "params.json", "a Llama model in Meta's original format"), config)
    paths = sorted(directory.glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{directory}: no consolidated.*.pth found")
    parts = [_open(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        check_shapes(_shapes(part), _shapes(parts[0]), f"{path.name} (compared with {paths[0].name})")

    full = external_shapes(config, weights)
    full |= {alias: full[owner] for alias, owner in weights.aliases.items()}
    joins = {name: _joined_dim(sizes, full.get(name)) for name, sizes in _shapes(parts[0]).items()}

    def fetch(name: str) -> Tensor:
        dim = joins[name]
        return parts[0][name] if dim is None else torch.cat([part[name] for part in parts], dim)

    def shape(name: str) -> list[int]:
        sizes, dim = list(parts[0][name].shape), joins[name]
        if dim is not None:
            sizes[dim] *= len(parts)
        return sizes

    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in parts[0].items()}
    source = TensorSource(str(directory), {name: shape(name) for name in parts[0]}, dtypes, fetch)
    return load_mapped(config, weights, source, device, dtype)


def _params(config: DecoderConfig) -> dict[str, Any]:
    """Return the `params.json` of a config, or raise ValueError with every reason why it has none."""
    wrong = []
    if config.norm not in ("rmsnorm", "fused_rmsnorm"):
        wrong.append(f"norm is {config.norm!r}, it supports rmsnorm only")
    if config.qk_norm:
        wrong.append("qk_norm is set, it has no such norms")
    wrong += [
        f"{name} is {getattr(config, name)}, which it does not have"
        for name in _NOT_IN_LLAMA
        if getattr(config, name) != getattr(DecoderConfig, name)
    ]
    if config.rope_scaling is not None and not isinstance(config.rope_scaling, Llama3Scaling):
        wrong.append(f"rope_scaling is {config.rope_scaling}, it supports that of Llama 3 only")
    if config.moe is not None:
        wrong.append("moe is set, it has no experts")
    if config.attention_head_dim * config.n_heads != config.dim:
        wrong.append(f"head_dim is {config.head_dim}, it supports dim / n_heads only")
    if wrong:
        raise ValueError("Meta's original format cannot represent this model: " + "; ".join(wrong))
    # Meta's code computes the feed-forward's width as (8 / 3 * dim * multiplier), truncated, then rounded up to a
    # multiple. Half a unit added to our width makes the truncation arrive at it exactly.
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": math.gcd(config.ffn_dim, 4096),
        "ffn_dim_multiplier": (config.ffn_dim + 0.5) / (8 * config.dim // 3),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
    }


def _check_params(found: dict[str, Any], config: DecoderConfig) -> None:
    """Raise ValueError if a `params.json` contradicts the config; the message lists every contradiction."""
    # Defaults of the reference code. The feed-forward's width is not compared here: the tensors' shapes are.
    values = {"n_kv_heads": found.get("n_heads"), "rope_theta": 10_000.0, "use_scaled_rope": False, **found}
    expected = _params(config)
    for key in ("multiple_of", "ffn_dim_multiplier"):
        del expected[key]
    if values.get("vocab_size") == -1:  # Llama 2: the size of the tokenizer's vocabulary
        del expected["vocab_size"]
    wrong = [
        f"{key} is {values[key]}, the config has {value}"
        for key, value in expected.items()
        if key in values and values[key] != value
    ]
    if wrong:
        raise ValueError("params.json contradicts the config: " + "; ".join(wrong))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _open(path: Path) -> dict[str, Tensor]:
    check_downloaded(path)
    try:
        part = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path}: unreadable, or contains objects other than tensors: {error}") from None
    if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
        raise WeightsError(f"{path}: must contain a dict of tensors by name")
    return part


def _joined_dim(sizes: tuple[int, ...], full: tuple[int, ...] | None) -> int | None:
    """Return the dim along which parts are joined; None if a part is the full tensor, or cannot be a part of it."""
    if full is None or len(sizes) != len(full):
        return None
    short = [dim for dim, size in enumerate(sizes) if size != full[dim]]
    return short[0] if len(short) == 1 else None
