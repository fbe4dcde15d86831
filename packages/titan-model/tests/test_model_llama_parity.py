"""The decoder computes what `transformers`' Llama computes, from the same weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from titan_model import Decoder, DecoderConfig, RopeScaling, cross_entropy_sum
from titan_model.rope import inverse_frequencies

transformers = pytest.importorskip("transformers")

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)
SEQ_LEN = 96  # three times the original context
HEADS = {"multi-head": {"n_kv_heads": 4}, "grouped": {"n_kv_heads": 2}, "multi-query": {"n_kv_heads": 1}}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta": {"rope_theta": 500_000.0},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 100.0},
    "scaled-more": {"rope_scaling": replace(SCALING, factor=32.0, low_freq_factor=0.5), "rope_theta": 500.0},
}


def hugging_face_name(name: str) -> str:
    """Return what Hugging Face calls our parameter."""
    for ours, theirs in (
        ("embed.", "model.embed_tokens."),
        ("head.", "lm_head."),
        ("norm.", "model.norm."),
        ("layers.", "model.layers."),
    ):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    for ours, theirs in (
        (".attn.", ".self_attn."),
        (".attn_norm.", ".input_layernorm."),
        (".ffn_norm.", ".post_attention_layernorm."),
        (".ffn.", ".mlp."),
    ):
        name = name.replace(ours, theirs)
    return name


def twin(model: Decoder, attention: str) -> Any:
    """Return `transformers`' Llama of the same shape and weights."""
    config = model.config
    scaling = config.rope_scaling
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=4 * SEQ_LEN,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            rope_scaling=None
            if scaling is None
            else {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            },
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation=attention,
        )
    ).float()
    weights = {hugging_face_name(name): value for name, value in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    return theirs


def random_tokens(config: DecoderConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, SEQ_LEN), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads", HEADS)
def test_logits_agree(
    random_decoder: Callable[..., Decoder], heads: str, rope: str, tied: bool, attention: str
) -> None:
    model = random_decoder(**HEADS[heads], **ROPES[rope], tied_embeddings=tied, norm_eps=1e-3)
    tokens = random_tokens(model.config)
    with torch.no_grad():
        ours, theirs = model(tokens), twin(model, attention)(tokens, use_cache=False).logits
    assert ours.std() > 0.5  # large enough for 1e-5 to say something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ["plain", "scaled"])
@pytest.mark.parametrize("heads", HEADS)
def test_gradients_of_a_step_agree(random_decoder: Callable[..., Decoder], heads: str, rope: str, tied: bool) -> None:
    ours = random_decoder(**HEADS[heads], **ROPES[rope], tied_embeddings=tied)
    theirs = twin(ours, "eager")
    tokens = random_tokens(ours.config)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    scored = int((labels != -100).sum())

    (cross_entropy_sum(ours(tokens), labels) / scored).backward()
    theirs(tokens, labels=tokens, use_cache=False).loss.backward()  # Hugging Face shifts by itself

    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    our_gradients = {hugging_face_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rope", ["scaled", "scaled-more"])
def test_the_scaled_cases_reach_all_three_regimes(tiny: DecoderConfig, rope: str) -> None:
    # Otherwise the parity above would prove little: wavelengths that stay, grow, and lie between.
    config = replace(tiny, **ROPES[rope])
    scaling = config.rope_scaling
    assert scaling is not None
    plain = inverse_frequencies(config.head_dim, config.rope_theta, None)
    ratio = plain / inverse_frequencies(config.head_dim, config.rope_theta, scaling)
    kept, grown = ratio < 1 + 1e-6, ratio > scaling.factor * (1 - 1e-6)
    assert kept.any()
    assert grown.any()
    assert (~kept & ~grown).any()
    assert scaling.original_context < SEQ_LEN
