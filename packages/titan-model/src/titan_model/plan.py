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
    """

    blocks: list[str]
    before: list[str]
    after: list[str]
    tensor: dict[str, str]
    tied: list[tuple[str, str]]
    divisible: dict[str, int]


def parallel_plan(config: DecoderConfig) -> DecoderPlan:
    """Return the plan of the decoder that `config` describes."""
    return {
        "blocks": ["layers.*"],
        "before": ["embed"],
        "after": ["norm", "head"],
        "tensor": {
            "embed": "vocab",
            "layers.*.attn_norm": "sequence",
            "layers.*.attn": "gather",
            "layers.*.attn.q_proj": "colwise",
            "layers.*.attn.k_proj": "colwise",
            "layers.*.attn.v_proj": "colwise",
            "layers.*.attn.o_proj": "rowwise",
            "layers.*.ffn_norm": "sequence",
            "layers.*.ffn": "gather",
            "layers.*.ffn.gate_proj": "colwise",
            "layers.*.ffn.up_proj": "colwise",
            "layers.*.ffn.down_proj": "rowwise",
            "norm": "sequence",
            "head": "logits",
        },
        "tied": [("head.weight", "embed.weight")] if config.tied_embeddings else [],
        "divisible": {
            "attention heads (n_heads)": config.n_heads,
            "key/value heads (n_kv_heads)": config.n_kv_heads,
            "feed-forward width (ffn_dim)": config.ffn_dim,
            "vocabulary (vocab_size)": config.vocab_size,
        },
    }
