"""What a decoder costs: parameters and floating-point operations."""

from __future__ import annotations

from titan_model.config import DecoderConfig


def count_parameters(config: DecoderConfig) -> int:
    """Return the exact number of parameters; a tied weight counts once."""
    embeddings = config.vocab_size * config.dim * (1 if config.tied_embeddings else 2)
    norms = config.dim * (2 * config.n_layers + 1)
    return embeddings + norms + config.n_layers * _block_matrices(config)


def flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Return the floating-point operations that training needs for one token, forward and backward.

    Six for each weight of a matrix product (two forward, four backward; the embedding is a look-up and costs none),
    and for attention six for each query-key pair and dimension of scores and of values, over half the pairs, since a
    causal query looks at (S + 1) / 2 keys on average. Nothing is counted twice for activation checkpointing. This is
    the model FLOPs of PaLM's MFU (Chowdhery et al. 2022, appendix B) but with the causal half counted once.

    Args:
        config: The decoder's shape.
        seq_len: Tokens per sequence.

    Returns:
        FLOPs per trained token.
    """
    weights = config.n_layers * _block_matrices(config) + config.vocab_size * config.dim
    pairs_per_token = (seq_len + 1) / 2
    attention = config.n_layers * 2 * config.dim * pairs_per_token
    return 6 * (weights + attention)


def _block_matrices(config: DecoderConfig) -> int:
    attention = 2 * config.dim * config.dim + 2 * config.dim * config.n_kv_heads * config.head_dim
    return attention + 3 * config.dim * config.ffn_dim
