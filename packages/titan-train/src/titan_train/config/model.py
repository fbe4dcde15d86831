"""The sections [model] and [moe]: a preset of titan-model, and what to change of it."""

from __future__ import annotations

from typing import Literal

from titan_train.config.section import Count, CountOrZero, NotNegative, Positive, Section


class ModelSection(Section):
    """The model: a preset of titan-model, and what to change of it. "none" keeps the preset's value."""

    preset: str = "debug"
    """Name of a titan-model preset."""
    vocab_size: Count | None = None
    """Number of token ids: rows of the embedding and of the output head."""
    dim: Count | None = None
    """Width of the residual stream (hidden size)."""
    n_layers: Count | None = None
    """Number of transformer blocks."""
    n_heads: Count | None = None
    """Number of query heads."""
    n_kv_heads: Count | None = None
    """Number of key/value heads; fewer than n_heads is grouped-query attention."""
    head_dim: Count | None = None
    """Width of one attention head, if it is not `dim / n_heads`."""
    ffn_dim: Count | None = None
    """Inner width of the feed-forward layer (intermediate size)."""
    max_seq_len: Count | None = None
    """Longest sequence that the model accepts, in tokens."""
    norm: Literal["rmsnorm", "fused_rmsnorm", "layernorm", "np_layernorm"] | None = None
    """Kind of normalization; np_layernorm has no parameters."""
    qk_norm: bool | None = None
    """Normalize the queries and keys of each head."""
    rope_theta: Positive | None = None
    """Base of the rotary position embedding's wavelengths."""
    tied_embeddings: bool | None = None
    """Share one weight between the embedding and the output head."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] | None = None
    """Attention kernel; auto uses the fastest one that the device supports."""


class MoESection(Section):
    """Changes to the preset's mixture of experts, for presets that have one. "none" keeps the preset's value."""

    n_experts: Count | None = None
    """Number of experts in each block."""
    top_k: Count | None = None
    """Number of experts that each token is sent to."""
    ffn_dim: Count | None = None
    """Inner width of one expert."""
    shared_ffn_dim: CountOrZero | None = None
    """Inner width of the shared expert, which every token is sent to as well; 0 for no shared expert."""
    balance_loss: NotNegative | None = None
    """Coefficient of the load-balancing loss; 0 turns it off."""
    balance_bias_rate: NotNegative | None = None
    """Change of each expert's selection bias per step, against its load; 0 turns the bias off."""
