"""The sections [model], [rope] and [moe]: a preset of titan-model, and what to change of it."""

from __future__ import annotations

from typing import Literal

from titan_train.config.section import Count, CountOrZero, NotNegative, Positive, Section, Text


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
    qkv_bias: bool | None = None
    """Give the projections to queries, keys and values biases."""
    rope_theta: Positive | None = None
    """Base of the rotary position embedding's wavelengths."""
    window: Count | None = None
    """Number of tokens that each token attends to, itself included (sliding window)."""
    full_layers: list[CountOrZero] | None = None
    """Indices of the blocks that attend to the full sequence in spite of the window; 0 is the first."""
    rotary_fraction: Positive | None = None
    """Part of each head that rotary positions turn, at most 1."""
    nope_layers: list[CountOrZero] | None = None
    """Indices of the blocks without rotary positions; 0 is the first."""
    embedding_multiplier: Positive | None = None
    """Factor of the embeddings."""
    residual_multiplier: Positive | None = None
    """Factor of what each block adds to the residual stream."""
    attention_multiplier: Positive | None = None
    """Factor of attention scores, if it is not one over the square root of the head width."""
    logits_scaling: Positive | None = None
    """Divisor of the logits."""
    tied_embeddings: bool | None = None
    """Share one weight between the embedding and the output head."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] | None = None
    """Attention kernel; auto uses the fastest one that the device supports."""
    family: Text | None = None
    """Hugging Face model_type that exports are written as, where several could be: llama, mistral, ..."""


class RopeSection(Section):
    """Scaling of rotary positions, to extend the context. Set `type` and what that type needs."""

    type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] | None = None
    """Kind of scaling; default for no scaling, "none" keeps the preset's."""
    factor: Positive | None = None
    """How much the longest wavelengths are extended; at least 1."""
    original_context: Count | None = None
    """Context length of pre-training, in tokens (dynamic, yarn, llama3, longrope)."""
    short_factor: list[Positive] | None = None
    """Factor of each wavelength in documents within original_context (longrope)."""
    long_factor: list[Positive] | None = None
    """Factor of each wavelength in longer documents (longrope)."""
    low_freq_factor: Positive | None = None
    """Wavelengths above original_context / low_freq_factor are scaled by all of the factor (llama3)."""
    high_freq_factor: Positive | None = None
    """Wavelengths below original_context / high_freq_factor are unchanged (llama3)."""
    attention_factor: Positive | None = None
    """Factor of queries and keys; "none" for that of the paper (yarn, longrope)."""
    beta_fast: Positive | None = None
    """Wavelengths that turn so often within the original context are unchanged (yarn)."""
    beta_slow: Positive | None = None
    """Wavelengths that turn only so often are scaled by all of the factor (yarn)."""
    truncate: bool | None = None
    """Round the bounds between these outwards to whole pairs of dims (yarn)."""


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
