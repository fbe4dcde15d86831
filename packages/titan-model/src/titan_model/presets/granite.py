"""Granite 3.3 (IBM 2025; the released config.json of the instruct models): a Llama with four constant factors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from titan_model.config import DecoderConfig

_ALL: dict[str, Any] = {
    "vocab_size": 49_159,
    "n_layers": 40,
    "n_heads": 32,
    "n_kv_heads": 8,
    "max_seq_len": 131_072,
    "rope_theta": 10_000_000.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "tied_embeddings": True,
}

GRANITE: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "granite_3_3_2b": DecoderConfig(
            dim=2048, ffn_dim=8192, attention_multiplier=0.015625, logits_scaling=8.0, **_ALL
        ),
        "granite_3_3_8b": DecoderConfig(
            dim=4096, ffn_dim=12_800, attention_multiplier=0.0078125, logits_scaling=16.0, **_ALL
        ),
    }
)
