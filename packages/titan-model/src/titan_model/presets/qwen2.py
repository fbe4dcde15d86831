"""Qwen2.5 (Qwen team 2024, arXiv:2412.15115; the released config.json). Its blocks are those of Qwen2.

Context lengths are those of the released chat models and of the small base models (32,768); the large base models
specify 131,072.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from titan_model.config import DecoderConfig

_ALL: dict[str, Any] = {"max_seq_len": 32_768, "qkv_bias": True, "rope_theta": 1_000_000.0}
_SMALL: dict[str, Any] = {**_ALL, "vocab_size": 151_936, "norm_eps": 1e-6, "tied_embeddings": True}
_LARGE: dict[str, Any] = {**_ALL, "vocab_size": 152_064, "norm_eps": 1e-5}

QWEN2: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "qwen2_5_0_5b": DecoderConfig(dim=896, n_layers=24, n_heads=14, n_kv_heads=2, ffn_dim=4864, **_SMALL),
        "qwen2_5_1_5b": DecoderConfig(dim=1536, n_layers=28, n_heads=12, n_kv_heads=2, ffn_dim=8960, **_SMALL),
        "qwen2_5_3b": DecoderConfig(dim=2048, n_layers=36, n_heads=16, n_kv_heads=2, ffn_dim=11_008, **_SMALL),
        "qwen2_5_7b": DecoderConfig(
            dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, ffn_dim=18_944, **{**_LARGE, "norm_eps": 1e-6}
        ),
        "qwen2_5_14b": DecoderConfig(dim=5120, n_layers=48, n_heads=40, n_kv_heads=8, ffn_dim=13_824, **_LARGE),
        "qwen2_5_32b": DecoderConfig(dim=5120, n_layers=64, n_heads=40, n_kv_heads=8, ffn_dim=27_648, **_LARGE),
        "qwen2_5_72b": DecoderConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=29_568, **_LARGE),
    }
)
