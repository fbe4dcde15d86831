"""Debug models, small enough for a laptop's CPU, one of each family, for the 258 tokens of a byte tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from titan_model.config import DecoderConfig, MoEConfig
from titan_model.rope_scalings import Llama3Scaling

# The next multiple of 8 after 258, so that the vocabulary can be split.
_VOCAB = 264

DEBUG: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "debug": DecoderConfig(
            vocab_size=_VOCAB, dim=256, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=704, max_seq_len=1024
        ),
        # Like Llama 3.2: tied embeddings, and rotary wavelengths scaled beyond the context of pre-training.
        "debug_llama3": DecoderConfig(
            vocab_size=_VOCAB,
            dim=256,
            n_layers=4,
            n_heads=16,
            n_kv_heads=8,
            ffn_dim=704,
            max_seq_len=4096,
            rope_theta=10_000.0,
            rope_scaling=Llama3Scaling(factor=8.0, original_context=512),
            tied_embeddings=True,
        ),
        "debug_qwen3": DecoderConfig(
            vocab_size=_VOCAB,
            dim=256,
            n_layers=4,
            n_heads=16,
            n_kv_heads=8,
            head_dim=32,
            ffn_dim=704,
            max_seq_len=1024,
            norm_eps=1e-6,
            qk_norm=True,
            rope_theta=1_000_000.0,
            tied_embeddings=True,
        ),
        "debug_moe": DecoderConfig(
            vocab_size=_VOCAB,
            dim=256,
            n_layers=4,
            n_heads=16,
            n_kv_heads=8,
            head_dim=32,
            ffn_dim=704,
            moe=MoEConfig(n_experts=8, top_k=2, ffn_dim=256, balance_loss=0.001),
            max_seq_len=1024,
            norm_eps=1e-6,
            qk_norm=True,
            rope_theta=1_000_000.0,
        ),
    }
)
