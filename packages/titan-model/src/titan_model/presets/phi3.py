"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv:2404.14219 and arXiv:2412.08905; the released config.json)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from titan_model.config import DecoderConfig
from titan_model.rope_scalings import LongRopeScaling

_PHI3: dict[str, Any] = {"vocab_size": 32_064, "max_seq_len": 4096, "window": 2047, "family": "phi3"}
# Those of Phi-4-mini: within 4,096 tokens nothing is scaled.
# fmt: off
_LONG = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)
# fmt: on

PHI3: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "phi3_mini_4k": DecoderConfig(dim=3072, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=8192, **_PHI3),
        "phi3_medium_4k": DecoderConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=10, ffn_dim=17_920, **_PHI3),
        "phi4": DecoderConfig(
            vocab_size=100_352,
            dim=5120,
            n_layers=40,
            n_heads=40,
            n_kv_heads=10,
            ffn_dim=17_920,
            max_seq_len=16_384,
            rope_theta=250_000.0,
            family="phi3",
        ),
        "phi4_mini": DecoderConfig(
            vocab_size=200_064,
            dim=3072,
            n_layers=32,
            n_heads=24,
            n_kv_heads=8,
            ffn_dim=8192,
            max_seq_len=131_072,
            rope_scaling=LongRopeScaling(
                short_factor=(1.0,) * 48, long_factor=_LONG, original_context=4096, factor=32.0
            ),
            rotary_fraction=0.75,
            tied_embeddings=True,
        ),
    }
)
