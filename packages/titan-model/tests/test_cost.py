"""Parameter counts against the built model; FLOPs against torch's own counter."""

import re
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_families import presets
from titan_model import DecoderConfig, build, count_parameters, flops_per_token, preset
from titan_model.cost import count_active_parameters

EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.")


@pytest.mark.parametrize("name", presets())
def test_count_is_what_the_built_preset_holds(name: str) -> None:
    model = build(preset(name), "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count_parameters(preset(name)) == sum(parameter.numel() for parameter in model.parameters())


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_counts_are_what_any_built_config_holds(
    small_configs: st.SearchStrategy[DecoderConfig], data: st.DataObject
) -> None:
    config = data.draw(small_configs)
    held = active = 0
    for name, parameter in build(config, "meta").named_parameters():
        held += parameter.numel()
        per_token = 1 if config.moe is None or not EXPERT.match(name) else config.moe.top_k / config.moe.n_experts
        active += round(parameter.numel() * per_token)
    assert count_parameters(config) == held
    assert count_active_parameters(config) == active


def test_active_parameters_of_qwen3_are_the_reported_ones() -> None:
    # "A3B" and "A22B": 3.3 and 22 billion, as their model cards round them.
    assert count_active_parameters(preset("qwen3_30b_a3b")) / 1e9 == pytest.approx(3.3, abs=0.06)
    assert count_active_parameters(preset("qwen3_235b_a22b")) / 1e9 == pytest.approx(22, abs=0.5)


def test_tying_saves_the_head(tiny: DecoderConfig) -> None:
    saved = count_parameters(tiny) - count_parameters(replace(tiny, tied_embeddings=True))
    assert saved == tiny.vocab_size * tiny.dim


def grouped_flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Each row of `[N, I]` meets one of `[E, I, O]`; the weights' gradient is of `[I, N]` and `[N, O]`."""
    return 2 * prod(a) * b[-1]


def counted_flops(config: DecoderConfig, batch: int, seq_len: int) -> dict[str, int]:
    """Return what torch counts for forward and backward, split into weight and attention products."""
    model = build(config, "cpu")
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    grouped = {torch.ops.aten._grouped_mm: grouped_flops}
    # This backend is made of batched products, which the counter knows; it has no formula for CPU flash.
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, labels=tokens).total.backward()
    by_op = counter.get_flop_counts()["Global"]
    attention = by_op.pop(torch.ops.aten.bmm)
    if config.moe is not None:  # the outputs of a token's experts are added up by a batched product, too
        blocks = sum(config.has_experts(layer) for layer in range(config.n_layers))
        attention -= 6 * blocks * batch * seq_len * config.moe.top_k * config.dim
    return {"weights": sum(by_op.values()), "attention": attention}


@settings(deadline=None, max_examples=10)
@given(data=st.data(), batch=st.integers(2, 3), seq_len=st.integers(2, 12))
def test_flops_are_those_torch_counts(
    small_configs: st.SearchStrategy[DecoderConfig], data: st.DataObject, batch: int, seq_len: int
) -> None:
    config = data.draw(small_configs)
    counted = counted_flops(config, batch, seq_len)
    tokens = batch * seq_len

    # Weights: every matrix but the embedding's look-up, two FLOPs per weight forward and four backward.
    model = build(config, "meta")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    idle = count_parameters(config) - count_active_parameters(config)
    weights = 6 * (matrices - idle - (0 if config.tied_embeddings else model.embed.weight.numel()))
    assert counted["weights"] == weights * tokens

    # Attention: torch multiplies the whole S x S square, masked or not, and counts it; the causal half, which is all
    # the model asks for, has S (S + 1) / 2 of those S**2 pairs. The products are exact integers, so is the ratio.
    assert counted["attention"] * (seq_len + 1) == (flops_per_token(config, seq_len) - weights) * tokens * 2 * seq_len


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), window=st.integers(1, 35))
def test_a_window_costs_the_keys_within_it(tiny: DecoderConfig, lengths: list[int], window: int) -> None:
    config = replace(tiny, n_layers=3, window=window, full_layers=(1,))
    keys = sum(min(place + 1, window) for length in lengths for place in range(length))
    full = sum(place + 1 for length in lengths for place in range(length))
    widths = 2 * tiny.n_heads * tiny.attention_head_dim
    weights = flops_per_token(replace(config, n_layers=3, window=None, full_layers=()), 1) - 6 * 3 * widths
    total = flops_per_token(config, sum(lengths), document_lengths=lengths) * sum(lengths)
    assert total == pytest.approx(weights * sum(lengths) + 6 * widths * (2 * keys + full))


def test_attention_share_of_a_long_context() -> None:
    # By hand for Llama 3 8B at 8,192: 6 * 2 * 32 layers * 4096 dims * 4096.5 pairs.
    config = preset("llama3_8b")
    weights = 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096)
    assert flops_per_token(config, 8192) - weights == prod((6, 2, 32, 4096)) * 4096.5


def test_flops_grow_linearly_with_the_sequence(tiny: DecoderConfig) -> None:
    first, second, third = (flops_per_token(tiny, s) for s in (100, 200, 300))
    assert third - second == second - first > 0


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_documents_cost_what_they_would_alone(tiny: DecoderConfig, lengths: list[int]) -> None:
    alone = sum(length * flops_per_token(tiny, length) for length in lengths)
    packed = sum(lengths) * flops_per_token(tiny, sum(lengths), document_lengths=iter(lengths))
    assert packed == pytest.approx(alone, rel=1e-12)
    if len(lengths) > 1:
        assert packed < sum(lengths) * flops_per_token(tiny, sum(lengths))


@pytest.mark.parametrize(
    ("lengths", "found"), [([], "an empty list"), ([3, 0], "from 0 to 3"), ([5, 9], "from 5 to 9")], ids=str
)
def test_impossible_documents_are_refused(tiny: DecoderConfig, lengths: list[int], found: str) -> None:
    with pytest.raises(ValueError, match=f"seq_len .8.; got .*{found}"):
        flops_per_token(tiny, 8, document_lengths=lengths)
