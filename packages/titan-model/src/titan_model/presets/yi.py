"""Yi (01.AI 2024, arXiv:2403.04652; the released config.json): a Llama with another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from titan_model.config import DecoderConfig

_ALL: dict[str, Any] = {"vocab_size": 64_000, "max_seq_len": 4096, "rope_theta": 5_000_000.0}

YI: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "yi_6b": DecoderConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=4, ffn_dim=11_008, **_ALL),
        "yi_34b": DecoderConfig(dim=7168, n_layers=60, n_heads=56, n_kv_heads=8, ffn_dim=20_480, **_ALL),
    }
)
