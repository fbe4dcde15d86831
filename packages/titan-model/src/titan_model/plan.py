"""How a decoder may be split over ranks, as plain data (dicts, lists, strings).

titan-parallel takes it as its plan; nothing here imports that package.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from titan_model.config import DecoderConfig


class DecoderPlan(TypedDict):
    """Names of a `Decoder`'s modules and their roles; `*` matches any characters within one part of a dotted name.

    Attributes:
        blocks: The repeated blocks.
        before: Modules that run before the first block.
        after: Modules that run after the last block.
        tensor: Tensor-parallel style of modules, and of the experts' parameters.
        tied: Pairs of parameter names (alias, owner) that are one weight.
        divisible: Sizes that the tensor-parallel degree must divide, by a name for messages.
        attention: Modules that compute attention, given queries, keys, values and a mask with `document_ids`. Absent if
            what a token is computed from depends on more than that, so that no rank may have a part of a sequence
            (context parallelism): where rotary positions are scaled by the length of the document, and where blocks
            have a sliding window, which no context-parallel attention knows yet.
        sequence: Arguments of the decoder that have a sequence dim, and the number of that dim.
        positions: The one of these that holds the positions.
        heads: Number of query heads and of key/value heads.
        experts: Modules that hold the experts.
        n_experts: Number of experts in each of these; 0 if there are none.
        save: Operators of this package that are expensive to recompute relative to the size of their results.
    """

    blocks: list[str]
    before: list[str]
    after: list[str]
    tensor: dict[str, str]
    tied: list[tuple[str, str]]
    divisible: dict[str, int]
    attention: NotRequired[list[str]]
    sequence: dict[str, int]
    positions: str
    heads: tuple[int, int]
    experts: list[str]
    n_experts: int
    save: list[str]


def parallel_plan(config: DecoderConfig) -> DecoderPlan:
    """Return the plan of the decoder that `config` describes."""
    moe, layers = config.moe, range(config.n_layers)
    dense = [layer for layer in layers if not config.has_experts(layer)]
    tensor = {"embed": "vocab", **_attention_styles(config), "layers.*.ffn_norm": "sequence"}
    divisible = {
        "attention heads (n_heads)": config.n_heads,
        "vocabulary (vocab_size)": config.vocab_size,
    }
    if moe is None or len(dense) == config.n_layers:
        moe = None
        tensor["layers.*.ffn"] = "gather"
    else:
        tensor |= {"layers.*.ffn": "mixture", **{f"layers.{layer}.ffn": "gather" for layer in dense}}
    if dense:
        tensor |= _projection_styles("layers.*.ffn")
        divisible["feed-forward width (ffn_dim)"] = config.ffn_dim
    if moe:
        tensor |= {"layers.*.ffn.router": "router", **_projection_styles("layers.*.ffn.experts")}
        # Grouped products need a width that is a multiple of 8 on every rank.
        divisible["eighths of an expert's width (moe.ffn_dim / 8)"] = moe.ffn_dim // 8
        if moe.shared_ffn_dim:
            tensor |= _projection_styles("layers.*.ffn.shared")
            divisible["shared expert's width (moe.shared_ffn_dim)"] = moe.shared_ffn_dim
    plan: DecoderPlan = {
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
        "experts": ["layers.*.ffn.experts"] if moe else [],
        "n_experts": moe.n_experts if moe else 0,
        "save": ["titan_model.document_attention"],
    }
    by_length = config.rope_scaling is not None and config.rope_scaling.depends_on_length
    if by_length or any(window is not None and window < config.max_seq_len for window in config.windows):
        del plan["attention"]
    return plan


def _attention_styles(config: DecoderConfig) -> dict[str, str]:
    styles = {
        "layers.*.attn_norm": "sequence",
        "layers.*.attn": "gather",
        "layers.*.attn.q_proj": "colwise",
        "layers.*.attn.k_proj": "colwise_kv",
        "layers.*.attn.v_proj": "colwise_kv",
        "layers.*.attn.o_proj": "rowwise",
    }
    if config.qk_norm:  # each rank normalizes its own heads, all with the same weight
        styles |= {"layers.*.attn.q_norm": "local", "layers.*.attn.k_norm": "local"}
    return styles


def _projection_styles(prefix: str) -> dict[str, str]:
    return {f"{prefix}.gate_proj": "colwise", f"{prefix}.up_proj": "colwise", f"{prefix}.down_proj": "rowwise"}
