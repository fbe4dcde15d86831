"""Small configs of every family that Hugging Face knows, and what a comparison with transformers needs."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan_model import (
    DecoderConfig,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    preset,
    preset_names,
)
from titan_model.config import MoEConfig
from titan_model.convert.huggingface_config import config_to_huggingface
from titan_model.convert.huggingface_names import huggingface_map

SEQ_LEN = 96  # three times the original context of the scaled ones

_LLAMA: dict[str, Any] = {
    "vocab_size": 37,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 48,
    "max_seq_len": 384,
    "norm_eps": 1e-3,
}
# Wider heads than dim / n_heads.
_QWEN: dict[str, Any] = {**_LLAMA, "head_dim": 12, "qk_norm": True, "rope_theta": 1_000_000.0}
_SCALED: dict[str, Any] = {"rope_scaling": Llama3Scaling(factor=8.0, original_context=32), "rope_theta": 100.0}
_MOE = MoEConfig(n_experts=8, top_k=3, ffn_dim=24)

FAMILIES: dict[str, DecoderConfig] = {
    "llama": DecoderConfig(**_LLAMA),
    "llama-tied-scaled": DecoderConfig(**_LLAMA, **_SCALED, tied_embeddings=True),
    "llama-linear": DecoderConfig(**_LLAMA, rope_scaling=LinearScaling(factor=3.0), rope_theta=100.0),
    # As long as four times the original context is.
    "llama-dynamic": DecoderConfig(
        **{**_LLAMA, "max_seq_len": 128}, rope_scaling=DynamicScaling(factor=4.0, original_context=32), rope_theta=100.0
    ),
    "llama-wide-heads": DecoderConfig(**_LLAMA, head_dim=12),
    "qwen2": DecoderConfig(**_LLAMA, qkv_bias=True, rope_theta=1_000_000.0),
    "qwen2-tied-scaled": DecoderConfig(**_LLAMA, **_SCALED, qkv_bias=True, tied_embeddings=True),
    "qwen2-window": DecoderConfig(**_LLAMA, qkv_bias=True, window=24, full_layers=(0,)),
    "mistral": DecoderConfig(**_LLAMA, head_dim=12, window=24),
    "mistral-full": DecoderConfig(**_LLAMA, family="mistral", rope_theta=1_000_000.0),
    "mixtral": DecoderConfig(
        **{**_LLAMA, "ffn_dim": 24}, moe=MoEConfig(n_experts=8, top_k=2, ffn_dim=24), window=40, tied_embeddings=True
    ),
    "smollm3": DecoderConfig(**_LLAMA, nope_layers=(1,), tied_embeddings=True),
    "granite": DecoderConfig(
        **_LLAMA,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=0.5,
        tied_embeddings=True,
    ),
    "phi3": DecoderConfig(**_LLAMA, window=40, family="phi3"),
    "phi3-long": DecoderConfig(
        **_LLAMA,
        rotary_fraction=0.75,
        rope_scaling=LongRopeScaling(
            short_factor=(1.0, 1.1, 1.5), long_factor=(1.0, 3.0, 9.0), original_context=48, factor=8.0
        ),
        rope_theta=100.0,
    ),
    "qwen3": DecoderConfig(**_QWEN),
    "qwen3-tied-scaled": DecoderConfig(**{**_QWEN, **_SCALED}, tied_embeddings=True),
    "qwen3-yarn": DecoderConfig(
        **{**_QWEN, "rope_theta": 100.0}, rope_scaling=YarnScaling(factor=12.0, original_context=32)
    ),
    "qwen3-moe": DecoderConfig(**_QWEN, moe=_MOE),
    "qwen3-moe-mixed-tied": DecoderConfig(
        **_QWEN,
        moe=MoEConfig(n_experts=8, top_k=2, ffn_dim=24, dense_layers=(0,), normalize_top_k=False),
        tied_embeddings=True,
    ),
}


def randomize(model: nn.Module, seed: int = 7) -> None:
    """Fill a model with weights large enough for every part to matter, norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # With ones, a norm in the wrong place would go unseen.
            shift = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(shift, 0.2, generator=generator)


def random_tokens(config: DecoderConfig) -> Tensor:
    """Return tokens `[2, SEQ_LEN]`."""
    return torch.randint(0, config.vocab_size, (2, SEQ_LEN), generator=torch.Generator().manual_seed(3))


def transformers_model(config: DecoderConfig, **changes: Any) -> Any:
    """Return transformers' model of the same shape, as its own `config.json` describes it."""
    import transformers

    values = config_to_huggingface(config)
    kind = values.pop("model_type")
    described = transformers.AutoConfig.for_model(kind, **values, **changes)
    return transformers.AutoModelForCausalLM.from_config(described).float().eval()


def to_transformers(tensors: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Return internal tensors with the names and shapes that transformers 5 has in memory."""
    external: dict[str, Tensor] = {}
    for rule in huggingface_map(config, fused_experts=True).rules:
        external |= rule.to_external({name: tensors[name] for name in rule.internal})
    return external


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    """Hold logits `[B, S, V]` against one another: 1e-5 at most apart, and a KL divergence of at most 1e-9."""
    assert ours.std() > 0.5  # large enough for 1e-5 to say something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).max() <= 1e-9
    assert (q.exp() * (q - p)).sum(-1).max() <= 1e-9


def presets(names: Iterable[str] = (), *, slow: bool = False) -> list[Any]:
    """Return the given presets, or all, as values of a parameter.

    The deep ones, which take long, are in the slow set (with `slow` all of them), and those that differ from another of
    their family in sizes only run at night.
    """
    return [pytest.param(name, marks=preset_mark(name, slow=slow)) for name in names or preset_names()]


def preset_mark(name: str, *, slow: bool = False) -> Any:
    """Return the mark of a test of a preset."""
    if name in _SIBLINGS:
        return pytest.mark.nightly
    return pytest.mark.slow if slow or preset(name).n_layers > 40 else ()


_SIBLINGS = {
    *("qwen2_5_1_5b", "qwen2_5_3b", "qwen2_5_7b", "qwen2_5_14b", "qwen2_5_32b", "qwen2_5_72b"),
    *("mistral_7b_v0_3", "mistral_small_24b", "mixtral_8x22b", "yi_34b", "smollm2_360m", "smollm2_1_7b"),
    *("granite_3_3_8b", "phi3_medium_4k"),
}
