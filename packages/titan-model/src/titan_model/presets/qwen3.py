"""Qwen3, dense and mixture of experts (Qwen team 2025, arXiv:2505.09388, tables 1 and 2; the released config.json).

Context lengths are those of the released chat models (40,960); the base models specify 32,768. The coefficient of the
balancing loss is the `router_aux_loss_coef` of the released files, although there one loss covers all blocks together.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from titan_model.config import DecoderConfig, MoEConfig

_VOCAB = 151_936
_HEAD_DIM = 128
_CONTEXT = 40_960
_EPS = 1e-6
_THETA = 1_000_000.0

QWEN3: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "qwen3_0_6b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=1024,
            n_layers=28,
            n_heads=16,
            n_kv_heads=8,
            head_dim=_HEAD_DIM,
            ffn_dim=3072,
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
            tied_embeddings=True,
        ),
        "qwen3_1_7b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=2048,
            n_layers=28,
            n_heads=16,
            n_kv_heads=8,
            head_dim=_HEAD_DIM,
            ffn_dim=6144,
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
            tied_embeddings=True,
        ),
        "qwen3_4b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=2560,
            n_layers=36,
            n_heads=32,
            n_kv_heads=8,
            head_dim=_HEAD_DIM,
            ffn_dim=9728,
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
            tied_embeddings=True,
        ),
        "qwen3_8b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=4096,
            n_layers=36,
            n_heads=32,
            n_kv_heads=8,
            head_dim=_HEAD_DIM,
            ffn_dim=12_288,
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
        ),
        "qwen3_14b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=5120,
            n_layers=40,
            n_heads=40,
            n_kv_heads=8,
            head_dim=_HEAD_DIM,
            ffn_dim=17_408,
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
        ),
        "qwen3_32b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=5120,
            n_layers=64,
            n_heads=64,
            n_kv_heads=8,
            head_dim=_HEAD_DIM,
            ffn_dim=25_600,
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
        ),
        "qwen3_30b_a3b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=2048,
            n_layers=48,
            n_heads=32,
            n_kv_heads=4,
            head_dim=_HEAD_DIM,
            ffn_dim=6144,
            moe=MoEConfig(n_experts=128, top_k=8, ffn_dim=768, balance_loss=0.001),
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
        ),
        "qwen3_235b_a22b": DecoderConfig(
            vocab_size=_VOCAB,
            dim=4096,
            n_layers=94,
            n_heads=64,
            n_kv_heads=4,
            head_dim=_HEAD_DIM,
            ffn_dim=12_288,
            moe=MoEConfig(n_experts=128, top_k=8, ffn_dim=1536, balance_loss=0.001),
            max_seq_len=_CONTEXT,
            norm_eps=_EPS,
            qk_norm=True,
            rope_theta=_THETA,
        ),
    }
)
