"""How a decoder may be split, as plain data for whoever does the splitting."""

from __future__ import annotations

from typing import TypedDict

from titan_model.config import DecoderConfig


class DecoderPlan(TypedDict):
    """Names of a `Decoder`'s modules and their roles; `*` stands for any run of characters within one part of a name.

    Attributes:
        blocks: The repeated blocks.
        before: What runs before the first block.
        after: What runs after the last block.
        tensor: Tensor-parallel style of modules.
        tied: Pairs of parameter names (alias, owner) that are one weight.
        divisible: Sizes that a tensor-parallel degree has to divide, each under a name for messages.
        attention: What computes attention, given queries, keys, values and a mask with `document_ids`.
        sequence: Arguments of the decoder that hold the sequence, and in which dim they do.
        positions: The one of these that numbers the positions.
        heads: Query heads and key/value heads.
        experts: What holds the experts of each mixture.
        save: Operators of this package's own that cost much to compute again for the size of their results.
    """

    blocks: list[str]
    before: list[str]
    after: list[str]
    tensor: dict[str, str]
    tied: list[tuple[str, str]]
    divisible: dict[str, int]
    attention: list[str]
    sequence: dict[str, int]
    positions: str
    heads: tuple[int, int]
    experts: list[str]
    save: list[str]


def parallel_plan(config: DecoderConfig) -> DecoderPlan:
    """Return the plan of the decoder that `config` describes."""
    tensor = {"embed": "vocab", **_attention_styles(config), "layers.*.ffn_norm": "sequence", "layers.*.ffn": "gather"}
    divisible = {
        "attention heads (n_heads)": config.n_heads,
        "vocabulary (vocab_size)": config.vocab_size,
    }
    kinds = {config.has_experts(layer) for layer in range(config.n_layers)}
    if False in kinds:
        tensor |= _feed_forward_styles("layers.*.ffn")
        divisible["feed-forward width (ffn_dim)"] = config.ffn_dim
    if True in kinds and config.moe is not None:
        tensor |= {"layers.*.ffn.router": "replicate", "layers.*.ffn.experts": "replicate"}
        if config.moe.shared_ffn_dim:
            tensor |= _feed_forward_styles("layers.*.ffn.shared")
            divisible["shared expert's width (moe.shared_ffn_dim)"] = config.moe.shared_ffn_dim
    return {
        "blocks": ["layers.*"],
        "before": ["embed"],
        "after": ["norm", "head"],
        "tensor": tensor | {"norm": "sequence", "head": "logits"},
        "tied": [("head.weight", "embed.weight")] if config.tied_embeddings else [],
        "divisible": divisible,
        "attention": ["layers.*.attn.core"],
        "sequence": {"tokens": 1, "positions": 1, "document_ids": 1, "labels": 1},
        "positions": "positions",
        "heads": (config.n_heads, config.n_kv_heads),
        "experts": ["layers.*.ffn.experts"] if True in kinds else [],
        "save": ["titan_model.document_attention"],
    }


def _attention_styles(config: DecoderConfig) -> dict[str, str]:
    styles = {
        "layers.*.attn_norm": "sequence",
        "layers.*.attn": "gather",
        "layers.*.attn.q_proj": "colwise",
        "layers.*.attn.k_proj": "colwise_kv",
        "layers.*.attn.v_proj": "colwise_kv",
        "layers.*.attn.o_proj": "rowwise",
    }
    if config.qk_norm:  # each rank norms the heads that it has, all by the same weight
        styles |= {"layers.*.attn.q_norm": "local", "layers.*.attn.k_norm": "local"}
    return styles


def _feed_forward_styles(prefix: str) -> dict[str, str]:
    return {f"{prefix}.gate_proj": "colwise", f"{prefix}.up_proj": "colwise", f"{prefix}.down_proj": "rowwise"}
