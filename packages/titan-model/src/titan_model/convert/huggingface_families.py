"""The architectures of transformers that a `Decoder` can be, as data: what each always has, and its defaults.

`huggingface_keys` reads from it which keys a `config.json` must and may have, `huggingface_config` what keys that are
left out mean, and which architecture a model is written as.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from titan_model.config import DecoderConfig
from titan_model.rope_scalings import LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers.

    Attributes:
        architecture: Name of its class, as in `architectures`.
        qk_norm: Whether its heads' queries and keys are normalized.
        qkv_bias: Whether its projections to queries, keys and values have biases.
        experts: How its mixture of experts is spelled, if it has one: as Qwen's, or as Mixtral's.
        head_dim: Width of a head where the config does not say; None: `hidden_size / num_attention_heads`.
        norm_eps: What norms add where the config does not say.
        rope_theta: Base of the rotary wavelengths where the config does not say.
        needs_kv_heads: Whether the config must say the number of key/value heads; else it is that of query heads.
        windows: Which layers a sliding window is for.
        window: Width of the window where the config does not say.
        window_is_used: Whether a window is used without `use_sliding_window`.
        first_window: The first layer with a window where the config does not say; None if it cannot say it.
        rope_kinds: Types of scaled rotary positions that it has; None: all.
        original_context: Length of pre-training where the config does not say; None: `max_position_embeddings`.
        partial_rotary: Whether rotary positions may turn a part of each head only.
        no_rope_layers: Whether layers may be without rotary positions, as every fourth is by default.
        multipliers: Whether embeddings, residuals, scores and logits have factors.
        fused_projections: Whether projections of the same input are one tensor.
        tied: Whether the head shares the embedding's weight where the config does not say.
    """

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: Literal["qwen", "mixtral"] | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    needs_kv_heads: bool = True
    windows: Literal["none", "all", "by layer"] = "none"
    window: int | None = None
    window_is_used: bool = False
    first_window: int | None = None
    rope_kinds: tuple[str, ...] | None = None
    original_context: int | None = None
    partial_rotary: bool = False
    no_rope_layers: bool = False
    multipliers: bool = False
    fused_projections: bool = False
    tied: bool = False


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(architecture="LlamaForCausalLM", needs_kv_heads=False),
        "granite": Family(architecture="GraniteForCausalLM", needs_kv_heads=False, multipliers=True),
        "mistral": Family(architecture="MistralForCausalLM", windows="all", window=4096, window_is_used=True),
        "mixtral": Family(
            architecture="MixtralForCausalLM",
            experts="mixtral",
            norm_eps=1e-5,
            rope_theta=1_000_000.0,
            windows="all",
            window_is_used=True,
        ),
        "phi3": Family(
            architecture="Phi3ForCausalLM",
            norm_eps=1e-5,
            needs_kv_heads=False,
            windows="all",
            window_is_used=True,
            rope_kinds=("default", "longrope"),
            original_context=4096,
            partial_rotary=True,
            fused_projections=True,
        ),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM", qkv_bias=True, windows="by layer", window=4096, first_window=28
        ),
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            qk_norm=True,
            head_dim=128,
            windows="by layer",
            window=4096,
            first_window=28,
        ),
        "qwen3_moe": Family(
            architecture="Qwen3MoeForCausalLM", qk_norm=True, experts="qwen", windows="all", window=4096
        ),
        "smollm3": Family(
            architecture="SmolLM3ForCausalLM",
            rope_theta=2_000_000.0,
            windows="by layer",
            no_rope_layers=True,
            tied=True,
        ),
    }
)


def family_of(config: DecoderConfig) -> str:
    """Return the `model_type` that a model is written as: its own, or the plainest that has what it needs.

    Raises:
        ValueError: If its own is not known.
    """
    if config.family is not None:
        if config.family not in FAMILIES:
            raise ValueError(f"family is {config.family!r}; Hugging Face's are {', '.join(FAMILIES)}")
        return config.family
    return plainest_family(config)


def plainest_family(config: DecoderConfig) -> str:
    """Return the plainest `model_type` that has what the config asks for, or comes closest to it."""
    multipliers = (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)
    if config.attention_multiplier is not None or multipliers != (1, 1, 1):
        return "granite"
    if config.nope_layers:
        return "smollm3"
    if config.rotary_fraction != 1 or isinstance(config.rope_scaling, LongRopeScaling):
        return "phi3"
    if config.qkv_bias:
        return "qwen2"
    if config.qk_norm:
        return "qwen3" if config.moe is None else "qwen3_moe"
    if config.moe is not None:
        return "mixtral"
    return "llama" if config.window is None else "mistral"
