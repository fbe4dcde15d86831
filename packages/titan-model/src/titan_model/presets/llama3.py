"""Llama 3, 3.1 and 3.2 (Llama team 2024, arXiv:2407.21783, and the model cards of 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from titan_model.config import DecoderConfig
from titan_model.rope_scalings import Llama3Scaling

_VOCAB = 128_256
_THETA = 500_000.0

LLAMA3: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "llama3_8b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            ffn_dim=14_336,
            max_seq_len=8192,
            rope_theta=_THETA,
        ),
        "llama3_70b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            ffn_dim=28_672,
            max_seq_len=8192,
            rope_theta=_THETA,
        ),
        "llama3_1_8b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            ffn_dim=14_336,
            max_seq_len=131_072,
            rope_theta=_THETA,
            rope_scaling=Llama3Scaling(factor=8.0),
        ),
        "llama3_1_70b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            ffn_dim=28_672,
            max_seq_len=131_072,
            rope_theta=_THETA,
            rope_scaling=Llama3Scaling(factor=8.0),
        ),
        "llama3_1_405b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=16_384,
            n_layers=126,
            n_heads=128,
            n_kv_heads=8,
            ffn_dim=53_248,
            max_seq_len=131_072,
            rope_theta=_THETA,
            rope_scaling=Llama3Scaling(factor=8.0),
        ),
        "llama3_2_1b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=2048,
            n_layers=16,
            n_heads=32,
            n_kv_heads=8,
            ffn_dim=8192,
            max_seq_len=131_072,
            rope_theta=_THETA,
            rope_scaling=Llama3Scaling(factor=32.0),
            tied_embeddings=True,
        ),
        "llama3_2_3b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=3072,
            n_layers=28,
            n_heads=24,
            n_kv_heads=8,
            ffn_dim=8192,
            max_seq_len=131_072,
            rope_theta=_THETA,
            rope_scaling=Llama3Scaling(factor=32.0),
            tied_embeddings=True,
        ),
    }
)
