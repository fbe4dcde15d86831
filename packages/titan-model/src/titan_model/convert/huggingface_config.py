"""Conversion between the `config.json` of Hugging Face's transformers and `DecoderConfig`.

Called by `huggingface_files` to load a model, by `huggingface_names` for the config of a weight map, and by users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titan_model.config import DecoderConfig, MoEConfig
from titan_model.convert.errors import shown
from titan_model.convert.huggingface_families import FAMILIES, family_of, plainest_family
from titan_model.convert.huggingface_keys import key_errors
from titan_model.convert.huggingface_rope import extended_context, read_rope, rope_to_huggingface
from titan_model.convert.huggingface_windows import nope_layers, read_windows, windows_to_huggingface
from titan_model.rope_scalings import DynamicScaling, kind_of

_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def config_from_huggingface(values: Mapping[str, Any]) -> DecoderConfig:
    """Convert a `config.json` to a `DecoderConfig`.

    Every key must be known: one that may change what the model computes is refused, by name and with its value. Both
    spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` of
    transformers 5. Missing keys get the defaults of transformers. Dropout is not applied. Settings that balance the
    load of experts in training are not read: transformers balances on request only, and with another loss than
    `balance_loss`.

    Args:
        values: The contents of a `config.json` with a `model_type` of the README's table of families.

    Raises:
        ValueError: If a key is missing, has a value of the wrong type or one that a `Decoder` does not support, or is
            not known; the message lists every such key and value.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"config.json: model_type is {shown(kind)}; supported are {', '.join(FAMILIES)}")
    rope = read_rope(values, kind)
    wrong = key_errors(values, kind, rope)
    if wrong:
        raise ValueError(f"config.json of a {kind} model: " + "; ".join(wrong))
    family, heads = FAMILIES[kind], values["num_attention_heads"]
    # The heads together are as wide as the model by default; in Qwen3 the width of a head is independent.
    head_dim = _get(values, "head_dim", default=family.head_dim)
    if not family.qk_norm and head_dim is not None and head_dim * heads == values["hidden_size"]:
        head_dim = None
    windows = read_windows(values, kind)
    config = DecoderConfig(
        vocab_size=values["vocab_size"],
        dim=values["hidden_size"],
        n_layers=values["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=_get(values, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        ffn_dim=values["intermediate_size"],
        moe=_experts(values, kind) if family.experts else None,
        max_seq_len=rope.max_seq_len(),
        norm_eps=_get(values, "rms_norm_eps", default=family.norm_eps),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        rope_theta=rope.base(),
        rope_scaling=rope.scaling(),
        tied_embeddings=_get(values, "tie_word_embeddings", default=family.tied),
        init_std=_get(values, "initializer_range", default=0.02),
        window=windows.window,
        full_layers=windows.full_layers,
        rotary_fraction=rope.fraction(),
        nope_layers=nope_layers(values, kind),
        **_multipliers(values, kind),
    )
    return config if plainest_family(config) == kind else replace(config, family=kind)


def config_to_huggingface(config: DecoderConfig) -> dict[str, Any]:
    """Return the `config.json` of a model, in the spelling that every release of transformers reads.

    Token ids are null, since a `DecoderConfig` has none: if they were absent, transformers would use those of Llama 2.

    Raises:
        ValueError: If transformers has no architecture for this config; the message lists every reason.
    """
    kind = family_of(config)
    wrong = _not_representable(config, kind)
    if wrong:
        raise ValueError(f"Hugging Face's {kind} cannot represent this model: " + "; ".join(wrong))
    values: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **rope_to_huggingface(config, kind),
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind != "qwen2":  # which always has biases, whatever the config says
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    if FAMILIES[kind].multipliers:
        values |= {key: getattr(config, key) for key in _MULTIPLIERS}
        values["attention_multiplier"] = _score_factor(config)
    if FAMILIES[kind].no_rope_layers:
        values["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in range(config.n_layers)]
    values |= windows_to_huggingface(config, kind)
    if config.moe is not None:
        values |= _experts_to_huggingface(config.moe, kind)
    return values


def _score_factor(config: DecoderConfig) -> float:
    given = config.attention_multiplier
    return config.attention_head_dim**-0.5 if given is None else given


def _multipliers(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return Granite's factors, all of which are 1 where the config does not say."""
    if not FAMILIES[kind].multipliers:
        return {}
    return {key: _get(values, key, default=1.0) for key in (*_MULTIPLIERS, "attention_multiplier")}


def _get(values: Mapping[str, Any], key: str, *, default: Any) -> Any:
    """Return a value, or the default if the key is missing or null."""
    value = values.get(key)
    return default if value is None else value


def _experts(values: Mapping[str, Any], kind: str) -> MoEConfig:
    if FAMILIES[kind].experts == "mixtral":
        return MoEConfig(
            n_experts=values.get("num_local_experts") or values["num_experts"],
            top_k=values["num_experts_per_tok"],
            ffn_dim=values["intermediate_size"],
        )
    layers = range(values["num_hidden_layers"])
    step, dense = _get(values, "decoder_sparse_step", default=1), set(_get(values, "mlp_only_layers", default=()))
    return MoEConfig(
        n_experts=values.get("num_experts") or values["num_local_experts"],
        top_k=values["num_experts_per_tok"],
        ffn_dim=values["moe_intermediate_size"],
        dense_layers=tuple(layer for layer in layers if layer in dense or (layer + 1) % step),
        normalize_top_k=_get(values, "norm_topk_prob", default=False),
    )


def _experts_to_huggingface(moe: MoEConfig, kind: str) -> dict[str, Any]:
    if FAMILIES[kind].experts == "mixtral":
        return {"num_local_experts": moe.n_experts, "num_experts_per_tok": moe.top_k, "router_jitter_noise": 0.0}
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
    family, scaling, wrong = FAMILIES[kind], config.rope_scaling, []
    if config.norm not in ("rmsnorm", "fused_rmsnorm"):
        wrong.append(f"norm is {config.norm!r}, it supports rmsnorm only")
    for name, what in (("qk_norm", "norms of queries and keys"), ("qkv_bias", "such biases")):
        if getattr(config, name) and not getattr(family, name):
            wrong.append(f"{name} is set, it has no {what}")
        elif getattr(family, name) and not getattr(config, name):
            wrong.append(f"{name} is not set, it always has {what}")
    if kind == "llama" and config.dim % config.n_heads:
        wrong.append(f"dim {config.dim} is not a multiple of n_heads {config.n_heads}")
    if isinstance(scaling, DynamicScaling) and config.max_seq_len != extended_context(scaling):
        wrong.append(
            f"max_seq_len is {config.max_seq_len}, it supports {extended_context(scaling)} only "
            "(factor * original_context of the dynamic scaling)"
        )
    if scaling is not None and family.rope_kinds is not None and kind_of(scaling) not in family.rope_kinds:
        wrong.append(f"rope_scaling is {scaling}, it supports {', '.join(family.rope_kinds)}")
    if config.rotary_fraction != 1 and not family.partial_rotary:
        wrong.append(f"rotary_fraction is {config.rotary_fraction}, it supports 1 only")
    if config.nope_layers and not family.no_rope_layers:
        wrong.append(f"nope_layers is {list(config.nope_layers)}, it has rotary positions in all layers")
    if not family.multipliers:
        wrong += [
            f"{key} is {getattr(config, key)}, it has no such factor"
            for key in (*_MULTIPLIERS, "attention_multiplier")
            if getattr(config, key) != (None if key == "attention_multiplier" else 1)
        ]
    if config.window is not None and family.windows == "none":
        wrong.append(f"window is {config.window}, it attends to the full sequence")
    elif config.full_layers and family.windows == "all":
        wrong.append(f"full_layers is {list(config.full_layers)}, but it has a window in all layers or in none")
    return wrong + _experts_not_representable(config, kind)


def _experts_not_representable(config: DecoderConfig, kind: str) -> list[str]:
    moe, spelled = config.moe, FAMILIES[kind].experts
    if moe is None or spelled is None:
        if (moe is None) == (spelled is None):
            return []
        return ["moe is set, it has no experts" if spelled is None else "moe is not set, it always has experts"]
    wrong = []
    if moe.shared_ffn_dim:
        wrong.append(f"moe.shared_ffn_dim is {moe.shared_ffn_dim}, it has no shared expert")
    if moe.score != "softmax":
        wrong.append(f"moe.score is {moe.score!r}, it supports softmax only")
    if moe.route_scale != 1:
        wrong.append(f"moe.route_scale is {moe.route_scale}, it supports 1 only")
    if spelled == "mixtral":
        if moe.dense_layers:
            wrong.append(f"moe.dense_layers is {list(moe.dense_layers)}, it has experts in all layers")
        if not moe.normalize_top_k:
            wrong.append("moe.normalize_top_k is not set, it always normalizes")
        if moe.ffn_dim != config.ffn_dim:
            wrong.append(f"moe.ffn_dim is {moe.ffn_dim}, it supports that of ffn_dim only, {config.ffn_dim}")
    return wrong
