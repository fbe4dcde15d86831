"""The decoder computes what transformers computes, from the same weights: logits and gradients, for every family."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from model_families import (
    FAMILIES,
    SEQ_LEN,
    assert_same_logits,
    random_tokens,
    to_transformers,
    transformers_model,
)
from titan_model import (
    Decoder,
    DecoderConfig,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)
from titan_model.layers.rope import inverse_frequencies

transformers = pytest.importorskip("transformers")

SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)
HEADS = {"multi-head": {"n_kv_heads": 4}, "grouped": {"n_kv_heads": 2}, "multi-query": {"n_kv_heads": 1}}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta": {"rope_theta": 500_000.0},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 100.0},
    "scaled-more": {"rope_scaling": replace(SCALING, factor=32.0, low_freq_factor=0.5), "rope_theta": 500.0},
    "linear": {"rope_scaling": LinearScaling(factor=2.5)},
    "dynamic": {"rope_scaling": DynamicScaling(factor=8.0, original_context=48)},
    "yarn": {"rope_scaling": YarnScaling(factor=4.0, original_context=64), "rope_theta": 50.0},
    "longrope": {
        "rope_scaling": LongRopeScaling(
            short_factor=(1.0, 1.5, 2.0, 4.0),
            long_factor=(1.0, 3.0, 9.0, 20.0),
            original_context=64,
            factor=6.0,
            attention_factor=1.3,
        )
    },
    "yarn-own": {
        "rope_scaling": YarnScaling(
            factor=40.0, original_context=64, attention_factor=0.7, beta_fast=4.0, beta_slow=2.0, truncate=False
        ),
        "rope_theta": 20.0,
    },
}


def twin(model: Decoder, **changes: Any) -> Any:
    """Return transformers' model of the same shape and weights."""
    theirs = transformers_model(model.config, **changes)
    missing, unexpected = theirs.load_state_dict(to_transformers(dict(model.state_dict()), model.config), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tied_embeddings else [])
    return theirs


def assert_parity(model: Decoder, **changes: Any) -> None:
    tokens = random_tokens(model.config)
    with torch.no_grad():
        assert_same_logits(model(tokens), twin(model, **changes)(tokens, use_cache=False).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads", HEADS)
def test_logits_of_llama_agree(
    random_decoder: Callable[..., Decoder], heads: str, rope: str, tied: bool, attention: str
) -> None:
    changes = {**HEADS[heads], **ROPES[rope], "tied_embeddings": tied}
    model = random_decoder(**changes, norm_eps=1e-3, max_seq_len=4 * SEQ_LEN)
    assert_parity(model, attn_implementation=attention)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_agree(random_decoder: Callable[..., Decoder], family: str, heads: str) -> None:
    assert_parity(random_decoder(FAMILIES[family], **HEADS[heads]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_norm_changes_nothing(random_decoder: Callable[..., Decoder], family: str) -> None:
    assert_parity(random_decoder(FAMILIES[family], norm="fused_rmsnorm"))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_step_agree(random_decoder: Callable[..., Decoder], family: str) -> None:
    ours = random_decoder(FAMILIES[family])
    theirs = twin(ours)
    tokens = random_tokens(ours.config)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    scored = int((labels != -100).sum())

    (ours(tokens, labels=labels).total / scored).backward()
    theirs(tokens, labels=tokens, use_cache=False).loss.backward()  # transformers shifts by itself

    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    our_gradients = to_transformers(gradients, ours.config)
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert their_gradients[name].abs().max() > 1e-5, f"the gradient of {name} says nothing"
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rope", ["scaled", "scaled-more"])
def test_the_scaled_cases_reach_all_three_regimes(tiny: DecoderConfig, rope: str) -> None:
    # Otherwise the parity above would prove little: wavelengths that stay, grow, and lie between.
    config = replace(tiny, **ROPES[rope])
    scaling = config.rope_scaling
    assert scaling is not None
    plain = inverse_frequencies(config.attention_head_dim, config.rope_theta, None)
    ratio = plain / inverse_frequencies(config.attention_head_dim, config.rope_theta, scaling)
    kept, grown = ratio < 1 + 1e-6, ratio > scaling.factor * (1 - 1e-6)
    assert kept.any()
    assert grown.any()
    assert (~kept & ~grown).any()
    assert scaling.original_context < SEQ_LEN
