"""Llama weights as Meta released them: consolidated.*.pth, with names and a rotary layout of their own."""

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
from titan_model.convert.loading import foreign_shapes, load_mapped, read_description
from titan_model.convert.weight_map import InterleavedRotary, Rename, TensorRule, WeightMap
from titan_model.decoder import Decoder

_BLOCK = {
    "attn_norm": "attention_norm",
    "attn.v_proj": "attention.wv",
    "attn.o_proj": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn.gate_proj": "feed_forward.w1",
    "ffn.down_proj": "feed_forward.w2",
    "ffn.up_proj": "feed_forward.w3",
}


def meta_map(config: DecoderConfig) -> WeightMap:
    """Return the rules and the `params.json` of a Llama in Meta's original form.

    A tied head has no name of its own; files that hold a copy of it are read (`aliases`). Of scaled rotary positions
    `params.json` says only that there are such, not by how much.

    Args:
        config: The decoder's shape: a Llama 2, 3, 3.1 or 3.2.

    Raises:
        ValueError: If it is no Llama; the message lists every reason.
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
    return WeightMap(
        rules=tuple(rules),
        config=values,
        aliases={"output.weight": "tok_embeddings.weight"} if config.tied_embeddings else {},
        ignored=(r"rope\.freqs",),  # rotary frequencies, written as if they were weights
    )


def load_meta(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Build a decoder from a folder of Llama weights as Meta released them.

    The parts of a model that was split for several devices are put together tensor by tensor; the files are mapped
    into memory and read without running any code of theirs.

    Args:
        folder: Holds `consolidated.00.pth` and further parts, and `params.json`.
        config: The decoder's shape, for example `preset("llama3_8b")`; what `params.json` leaves open (context, by how
            much rotary positions are scaled, whether the head is tied) comes from here.
        device: Where the parameters shall lie.
        dtype: What they shall be; None keeps that of the files.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If `params.json` contradicts the config; the message lists every contradiction.
        WeightsError: If tensors are missing, unexpected or misshaped: all of them in one message.
    """
    folder = Path(folder)
    weights = meta_map(config)
    _check_params(read_description(folder / "params.json", "a Llama as Meta released it"), config)
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no consolidated.*.pth")
    parts = [_open(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        check_shapes(_shapes(part), _shapes(parts[0]), f"{path.name}, held against {paths[0].name},")

    whole = foreign_shapes(config, weights)
    whole |= {alias: whole[owner] for alias, owner in weights.aliases.items()}
    joins = {name: _joined_dim(sizes, whole.get(name)) for name, sizes in _shapes(parts[0]).items()}

    def fetch(name: str) -> Tensor:
        dim = joins[name]
        return parts[0][name] if dim is None else torch.cat([part[name] for part in parts], dim)

    def shape(name: str) -> list[int]:
        sizes, dim = list(parts[0][name].shape), joins[name]
        if dim is not None:
            sizes[dim] *= len(parts)
        return sizes

    return load_mapped(config, weights, {name: shape(name) for name in parts[0]}, fetch, str(folder), device, dtype)


def _params(config: DecoderConfig) -> dict[str, Any]:
    wrong = []
    if config.norm not in ("rmsnorm", "fused_rmsnorm"):
        wrong.append(f"norm is {config.norm!r}, it has rmsnorm only")
    if config.qk_norm:
        wrong.append("qk_norm is set, it has no such norms")
    if config.moe is not None:
        wrong.append("moe is set, it has no experts")
    if config.attention_head_dim * config.n_heads != config.dim:
        wrong.append(f"head_dim is {config.head_dim}, it has dim / n_heads only")
    if wrong:
        raise ValueError("Meta's original format cannot hold this model: " + "; ".join(wrong))
    # There the feed-forward's width is (8 / 3 * dim * multiplier), rounded up to a multiple; half a unit more than
    # ours makes their arithmetic arrive at it exactly.
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
    # As the reference code defaults them. The feed-forward's width is not compared: the tensors' shapes will tell.
    values = {"n_kv_heads": found.get("n_heads"), "rope_theta": 10_000.0, "use_scaled_rope": False, **found}
    expected = _params(config)
    for key in ("multiple_of", "ffn_dim_multiplier"):
        del expected[key]
    if values.get("vocab_size") == -1:  # Llama 2: as many as the tokenizer has
        del expected["vocab_size"]
    wrong = [
        f"{key} is {values[key]}, the config has {value}"
        for key, value in expected.items()
        if key in values and values[key] != value
    ]
    if wrong:
        raise ValueError("params.json is of another model than the config: " + "; ".join(wrong))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _open(path: Path) -> dict[str, Tensor]:
    try:
        part = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read, or holds more than tensors: {error}") from None
    if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
        raise WeightsError(f"{path} holds something else than tensors by name")
    return part


def _joined_dim(sizes: tuple[int, ...], whole: tuple[int, ...] | None) -> int | None:
    """Return the dim in which parts make a whole; None where a part is the whole already, or could not be of it."""
    if whole is None or len(sizes) != len(whole):
        return None
    short = [dim for dim, size in enumerate(sizes) if size != whole[dim]]
    return short[0] if len(short) == 1 else None
