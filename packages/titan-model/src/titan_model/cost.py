"""Cost of a decoder, from its config alone: number of parameters and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable

from titan_model.config import DecoderConfig


def count_parameters(config: DecoderConfig) -> int:
    """Return the exact number of parameters; a tied weight counts once."""
    return _count(config, experts=None)


def count_active_parameters(config: DecoderConfig) -> int:
    """Return the number of parameters that process one token: of each mixture of experts, `top_k` experts."""
    return _count(config, experts=0 if config.moe is None else config.moe.top_k)


def flops_per_token(config: DecoderConfig, seq_len: int, document_lengths: Iterable[int] | None = None) -> float:
    """Return the floating-point operations that training needs for one token, forward and backward.

    Six for each weight of a matrix product that processes the token (two forward, four backward; the embedding is a
    look-up and costs none, and of a mixture of experts only `top_k` experts count), and for attention six for each
    query-key pair and dimension of scores and of values. A causal query attends to itself and the tokens before it in
    its document, so each pair counts once, not twice; with a sliding window, only to those within it. Recomputation by
    activation checkpointing is not counted. Except for the causal half, windows and documents, these are the model
    FLOPs of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), and

        MFU = tokens per second * FLOPs per token / peak FLOPs per second.

    Args:
        config: The decoder's shape.
        seq_len: Tokens per sequence.
        document_lengths: Tokens of each document in typical sequences, if attention is restricted to documents; None
            if it covers the full sequence.

    Returns:
        FLOPs per trained token.

    Raises:
        ValueError: If a document has no tokens or more than a sequence, or the list is empty.

    Example:
        >>> from titan_model import flops_per_token, preset
        >>> config = preset("llama3_8b")
        >>> f"{flops_per_token(config, seq_len=8192):.3g}"
        '5.15e+10'
        >>> f"{flops_per_token(config, seq_len=8192, document_lengths=[1024] * 8):.3g}"
        '4.58e+10'
    """
    lengths = [seq_len] if document_lengths is None else list(document_lengths)
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= seq_len:
        found = f"lengths from {min(lengths)} to {max(lengths)}" if lengths else "an empty list"
        raise ValueError(f"document_lengths: each must be from 1 to seq_len ({seq_len}); got {found}")
    windows = [config.window_of(layer) for layer in range(config.n_layers)]
    pairs = sum(windows.count(window) * _pairs(lengths, window) for window in set(windows))
    attention = 2 * config.n_heads * config.attention_head_dim * pairs / sum(lengths)
    return 6 * (_active_matrices(config) + attention)


def _pairs(lengths: Iterable[int], window: int | None) -> float:
    """Return how many pairs of a query and a key one block computes in documents of these lengths."""
    pairs = 0.0
    for length in lengths:
        beyond = 0 if window is None else max(length - window, 0)  # keys that the last query does not attend to
        pairs += (length * (length + 1) - beyond * (beyond + 1)) / 2
    return pairs


def _active_matrices(config: DecoderConfig) -> int:
    """Return the number of weights in the matrix products that process one token."""
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.dim
    return count_active_parameters(config) - embedding - _norms(config) - _biases(config)


def _count(config: DecoderConfig, experts: int | None) -> int:
    """Count parameters; of each mixture only `experts` experts (None: all of them)."""
    embeddings = config.vocab_size * config.dim * (1 if config.tied_embeddings else 2)
    q_dim, kv_dim = (heads * config.attention_head_dim for heads in (config.n_heads, config.n_kv_heads))
    attention = 2 * config.dim * (q_dim + kv_dim)
    feed_forwards = sum(_feed_forward(config, layer, experts) for layer in range(config.n_layers))
    return embeddings + config.n_layers * attention + feed_forwards + _norms(config) + _biases(config)


def _feed_forward(config: DecoderConfig, layer: int, experts: int | None) -> int:
    moe = config.moe
    if moe is None or not config.has_experts(layer):
        return 3 * config.dim * config.ffn_dim
    held = moe.n_experts if experts is None else experts
    return config.dim * (moe.n_experts + 3 * held * moe.ffn_dim + 3 * moe.shared_ffn_dim)


def _norms(config: DecoderConfig) -> int:
    each = {"rmsnorm": 1, "fused_rmsnorm": 1, "layernorm": 2, "np_layernorm": 0}[config.norm] * config.dim
    heads = 2 * config.attention_head_dim if config.qk_norm else 0
    return each * (2 * config.n_layers + 1) + config.n_layers * heads


def _biases(config: DecoderConfig) -> int:
    width = config.attention_head_dim * (config.n_heads + 2 * config.n_kv_heads)
    return config.n_layers * width if config.qkv_bias else 0
