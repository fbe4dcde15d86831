"""A decoder small enough for a laptop's CPU, for the byte tokenizer's 258 tokens."""

from collections.abc import Mapping
from types import MappingProxyType

from titan_model.config import DecoderConfig

DEBUG: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        # 264 is the next multiple of 8 after 258, so that the vocabulary can be split.
        "debug": DecoderConfig(
            vocab_size=264, dim=256, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=704, max_seq_len=1024
        ),
    }
)
