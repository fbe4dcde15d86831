"""Conversion between the `config.json` of Hugging Face's transformers and `DecoderConfig`.

Called by `huggingface_files` to load a model, by `huggingface_names` for the config of a weight map, and by users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_model.config import DecoderConfig, MoEConfig
from titan_model.convert.errors import shown
from titan_model.convert.huggingface_keys import ARCHITECTURES, key_errors
from titan_model.convert.huggingface_rope import read_rope, scaling_to_huggingface


def config_from_huggingface(values: Mapping[str, Any]) -> DecoderConfig:
    """Convert a `config.json` to a `DecoderConfig`.

    Every key must be known: one that may change what the model computes is refused, by name and with its value. Both
    spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` of
    transformers 5. Missing keys get the defaults of transformers. Dropout is not applied. Settings that balance the
    load of experts in training are not read: transformers balances on request only, and with another loss than
    `balance_loss`.

    Args:
        values: The contents of a `config.json` of model type `llama`, `qwen3` or `qwen3_moe`.

    Raises:
        ValueError: If a key is missing, has a value of the wrong type or one that a `Decoder` does not support, or is
            not known; the message lists every such key and value.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type is {shown(kind)}; supported are {', '.join(ARCHITECTURES)}")
    rope = read_rope(values)
    wrong = key_errors(values, kind, rope)
    if wrong:
        raise ValueError(f"config.json of a {kind} model: " + "; ".join(wrong))
    heads = values["num_attention_heads"]
    # In Llama the heads together are as wide as the model by default; in Qwen3 the width of a head is independent.
    head_dim = _get(values, "head_dim", default=128 if kind == "qwen3" else None)
    if kind == "llama" and head_dim is not None and head_dim * heads == values["hidden_size"]:
        head_dim = None
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        dim=values["hidden_size"],
        n_layers=values["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=_get(values, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        ffn_dim=values["intermediate_size"],
        moe=_experts(values) if kind == "qwen3_moe" else None,
        max_seq_len=values["max_position_embeddings"],
        norm_eps=_get(values, "rms_norm_eps", default=1e-6),
        qk_norm=kind != "llama",
        rope_theta=rope.base(),
        rope_scaling=rope.scaling(),
        tied_embeddings=_get(values, "tie_word_embeddings", default=False),
        init_std=_get(values, "initializer_range", default=0.02),
    )


def config_to_huggingface(config: DecoderConfig) -> dict[str, Any]:
    """Return the `config.json` of a model, in the spelling that every release of transformers reads.

    Token ids are null, since a `DecoderConfig` has none: if they were absent, transformers would use those of Llama 2.

    Raises:
        ValueError: If transformers has no architecture for this config; the message lists every reason.
    """
    kind = "llama" if not config.qk_norm else "qwen3" if config.moe is None else "qwen3_moe"
    wrong = _not_representable(config, kind)
    if wrong:
        raise ValueError(f"Hugging Face's {kind} cannot represent this model: " + "; ".join(wrong))
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else scaling_to_huggingface(config.rope_scaling),
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "llama":
        values["mlp_bias"] = False
    else:
        values |= {"use_sliding_window": False, "sliding_window": None}
    if config.moe is not None:
        values |= _experts_to_huggingface(config.moe)
    return values


def _get(values: Mapping[str, Any], key: str, *, default: Any) -> Any:
    """Return a value, or the default if the key is missing or null."""
    value = values.get(key)
    return default if value is None else value


def _experts(values: Mapping[str, Any]) -> MoEConfig:
    layers = range(values["num_hidden_layers"])
    step, dense = _get(values, "decoder_sparse_step", default=1), set(_get(values, "mlp_only_layers", default=()))
    return MoEConfig(
        n_experts=values.get("num_experts") or values["num_local_experts"],
        top_k=values["num_experts_per_tok"],
        ffn_dim=values["moe_intermediate_size"],
        dense_layers=tuple(layer for layer in layers if layer in dense or (layer + 1) % step),
        normalize_top_k=_get(values, "norm_topk_prob", default=False),
    )


def _experts_to_huggingface(moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_dim,
        "norm_topk_prob": moe.normalize_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
    }


def _not_representable(config: DecoderConfig, kind: str) -> list[str]:
    """Return one message for each setting that the architecture `kind` of transformers has no equivalent of."""
    wrong = []
    if config.norm not in ("rmsnorm", "fused_rmsnorm"):
        wrong.append(f"norm is {config.norm!r}, it supports rmsnorm only")
    if kind == "llama" and config.moe is not None:
        wrong.append("moe is set without qk_norm")
    if kind == "llama" and config.dim % config.n_heads:
        wrong.append(f"dim {config.dim} is not a multiple of n_heads {config.n_heads}")
    if config.moe is not None:
        moe = config.moe
        if moe.shared_ffn_dim:
            wrong.append(f"moe.shared_ffn_dim is {moe.shared_ffn_dim}, it has no shared expert")
        if moe.score != "softmax":
            wrong.append(f"moe.score is {moe.score!r}, it supports softmax only")
        if moe.route_scale != 1:
            wrong.append(f"moe.route_scale is {moe.route_scale}, it supports 1 only")
    return wrong
