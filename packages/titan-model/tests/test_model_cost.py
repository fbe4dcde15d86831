"""Parameter counts against the published ones and the built model; FLOPs against torch's own counter."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_model import (
    DecoderConfig,
    build,
    count_parameters,
    cross_entropy_sum,
    flops_per_token,
    preset,
    preset_names,
)

# What the released checkpoints hold, tied weights once.
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
}


def held(config: DecoderConfig) -> int:
    return sum(parameter.numel() for parameter in build(config).parameters())


def test_every_published_figure_has_its_preset() -> None:
    assert PUBLISHED.keys() == set(preset_names()) - {"debug"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_is_the_published_one(name: str) -> None:
    assert count_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", preset_names())
def test_count_is_what_the_built_preset_holds(name: str) -> None:
    model = build(preset(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count_parameters(preset(name)) == held(preset(name))


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_count_is_what_any_built_config_holds(
    small_configs: st.SearchStrategy[DecoderConfig], data: st.DataObject
) -> None:
    config = data.draw(small_configs)
    assert count_parameters(config) == held(config)


def test_tying_saves_the_head(tiny: DecoderConfig) -> None:
    saved = count_parameters(tiny) - count_parameters(replace(tiny, tied_embeddings=True))
    assert saved == tiny.vocab_size * tiny.dim


def counted_flops(config: DecoderConfig, batch: int, seq_len: int) -> dict[str, int]:
    """Return what torch counts for forward and backward, split into weight and attention products."""
    model = build(config, "cpu")
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    # This backend is made of plain batched products, which the counter knows; it has no formula for CPU flash.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cross_entropy_sum(model(tokens), tokens).backward()
    by_op = counter.get_flop_counts()["Global"]
    attention = by_op.pop(torch.ops.aten.bmm)
    return {"weights": sum(by_op.values()), "attention": attention}


@settings(deadline=None, max_examples=15)
@given(data=st.data(), batch=st.integers(2, 3), seq_len=st.integers(2, 12))
def test_flops_are_those_torch_counts(
    small_configs: st.SearchStrategy[DecoderConfig], data: st.DataObject, batch: int, seq_len: int
) -> None:
    config = data.draw(small_configs)
    counted = counted_flops(config, batch, seq_len)
    tokens = batch * seq_len

    # Weights: every matrix but the embedding's look-up, two FLOPs per weight forward and four backward.
    head = config.vocab_size * config.dim
    norms = config.dim * (2 * config.n_layers + 1)
    embedding = 0 if config.tied_embeddings else head
    weights = 6 * (count_parameters(config) - norms - embedding)
    assert counted["weights"] == weights * tokens

    # Attention: torch multiplies the whole S x S square, masked or not, and counts it; the causal half, which is all
    # the model asks for, has S (S + 1) / 2 of those S**2 pairs. The products are exact integers, so is the ratio.
    assert counted["attention"] * (seq_len + 1) == (flops_per_token(config, seq_len) - weights) * tokens * 2 * seq_len


def test_attention_share_of_a_long_context() -> None:
    # By hand for Llama 3 8B at 8,192: 6 * 2 * 32 layers * 4096 dims * 4096.5 pairs.
    config = preset("llama3_8b")
    weights = 6 * (PUBLISHED["llama3_8b"] - 128_256 * 4096 - 65 * 4096)
    assert flops_per_token(config, 8192) - weights == prod((6, 2, 32, 4096)) * 4096.5


def test_flops_grow_linearly_with_the_sequence(tiny: DecoderConfig) -> None:
    first, second, third = (flops_per_token(tiny, s) for s in (100, 200, 300))
    assert third - second == second - first > 0
