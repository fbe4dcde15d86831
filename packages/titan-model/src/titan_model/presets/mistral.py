"""Mistral and Mixtral (Jiang et al. 2023, arXiv:2310.06825; 2024, arXiv:2401.04088; the released config.json)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from titan_model.config import DecoderConfig, MoEConfig

_ALL: dict[str, Any] = {"n_heads": 32, "n_kv_heads": 8, "family": "mistral"}
_7B: dict[str, Any] = {**_ALL, "dim": 4096, "n_layers": 32, "ffn_dim": 14_336, "max_seq_len": 32_768}
_WIDE: dict[str, Any] = {**_ALL, "vocab_size": 131_072, "dim": 5120, "n_layers": 40, "head_dim": 128}

MISTRAL: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "mistral_7b_v0_1": DecoderConfig(vocab_size=32_000, window=4096, **{**_7B, "family": None}),
        "mistral_7b_v0_3": DecoderConfig(vocab_size=32_768, rope_theta=1_000_000.0, **_7B),
        "mistral_nemo_12b": DecoderConfig(ffn_dim=14_336, max_seq_len=131_072, rope_theta=1_000_000.0, **_WIDE),
        "mistral_small_24b": DecoderConfig(ffn_dim=32_768, max_seq_len=32_768, rope_theta=100_000_000.0, **_WIDE),
        "mixtral_8x7b": DecoderConfig(
            vocab_size=32_000,
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            ffn_dim=14_336,
            moe=MoEConfig(n_experts=8, top_k=2, ffn_dim=14_336, balance_loss=0.02),
            max_seq_len=32_768,
            rope_theta=1_000_000.0,
        ),
        "mixtral_8x22b": DecoderConfig(
            vocab_size=32_000,
            dim=6144,
            n_layers=56,
            n_heads=48,
            n_kv_heads=8,
            ffn_dim=16_384,
            moe=MoEConfig(n_experts=8, top_k=2, ffn_dim=16_384, balance_loss=0.001),
            max_seq_len=65_536,
            rope_theta=1_000_000.0,
        ),
    }
)
