"""Llama 2 (Touvron et al. 2023, arXiv:2307.09288)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from titan_model.config import DecoderConfig

LLAMA2: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "llama2_7b": DecoderConfig(
            vocab_size=32_000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11_008, max_seq_len=4096
        ),
        "llama2_13b": DecoderConfig(
            vocab_size=32_000, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13_824, max_seq_len=4096
        ),
        "llama2_70b": DecoderConfig(
            vocab_size=32_000, dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28_672, max_seq_len=4096
        ),
    }
)
