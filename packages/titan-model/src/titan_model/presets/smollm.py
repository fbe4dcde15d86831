"""SmolLM2 (Ben Allal et al. 2025, arXiv:2502.02737), a small Llama, and SmolLM3; the released config.json.

Every fourth block of SmolLM3 is without rotary positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from titan_model.config import DecoderConfig

_SMOLLM2: dict[str, Any] = {"vocab_size": 49_152, "max_seq_len": 8192, "tied_embeddings": True}
_SMALL: dict[str, Any] = {**_SMOLLM2, "rope_theta": 100_000.0}

SMOLLM: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "smollm2_135m": DecoderConfig(
            dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536, init_std=0.041666666666666664, **_SMALL
        ),
        "smollm2_360m": DecoderConfig(dim=960, n_layers=32, n_heads=15, n_kv_heads=5, ffn_dim=2560, **_SMALL),
        "smollm2_1_7b": DecoderConfig(
            dim=2048, n_layers=24, n_heads=32, n_kv_heads=32, ffn_dim=8192, rope_theta=130_000.0, **_SMOLLM2
        ),
        "smollm3_3b": DecoderConfig(
            vocab_size=128_256,
            dim=2048,
            n_layers=36,
            n_heads=16,
            n_kv_heads=4,
            ffn_dim=11_008,
            max_seq_len=65_536,
            norm_eps=1e-6,
            rope_theta=5_000_000.0,
            nope_layers=tuple(range(3, 36, 4)),
            tied_embeddings=True,
        ),
    }
)
