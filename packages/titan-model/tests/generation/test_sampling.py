"""Draws from logits: their distribution, what they are a function of, and what is never drawn."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_model import SamplingParams, sample

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, -50.0, 0.0, 1.5, -0.5])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top-k": {"top_k": 3},
    "top-k of all": {"top_k": 8},
    "top-p": {"top_p": 0.7},
    "top-p of all": {"top_p": 1.0},
    "all three": {"temperature": 1.5, "top_k": 3, "top_p": 0.6},  # of the three, two
}


def expected_shares(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Work the distribution out from `transformers`' own definitions."""
    transformers = pytest.importorskip("transformers")
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    shares: Tensor = scores.softmax(-1)[0]
    return shares


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_distribution_of_transformers(name: str) -> None:
    n = 4000
    drawn = sample(LOGITS.expand(n, -1), torch.arange(n), SamplingParams(seed=3, **SETTINGS[name]))
    shares = torch.bincount(drawn, minlength=len(LOGITS)) / n
    expected = expected_shares(LOGITS, **SETTINGS[name])
    assert bool(((shares - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-9).all())
    assert shares[expected == 0].sum() == 0


@settings(deadline=None, max_examples=60)
@given(data=st.data(), vocab=st.integers(1, 12))
def test_only_the_likeliest_are_drawn(data: st.DataObject, vocab: int) -> None:
    # Few values, so that there are ties.
    logits = torch.tensor([data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=vocab, max_size=vocab))])
    k, p = data.draw(st.integers(1, 15)), data.draw(st.floats(0.01, 1.0))
    drawn = sample(logits.expand(200, -1), torch.arange(200), SamplingParams(top_k=k, top_p=p))
    order = sorted(range(vocab), key=lambda token: (-float(logits[0, token]), token))[:k]
    weights = torch.stack([logits[0, token] for token in order]).double().softmax(0)
    before = weights.cumsum(0) - weights
    assert set(drawn.tolist()) <= {token for token, mass in zip(order, before, strict=True) if mass < p + 1e-12}


def test_zero_temperature_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 4.0]])
    assert sample(logits, torch.tensor([0, 9]), SamplingParams(temperature=0)).tolist() == [1, 0]
    assert sample(logits, torch.tensor([0, 9]), SamplingParams(top_k=1)).tolist() == [1, 0]


def test_a_draw_is_a_function_of_seed_sequence_and_position() -> None:
    logits = torch.zeros(6, 1000)
    params = SamplingParams(seed=1)
    ids, positions = torch.tensor([0, 0, 1, 1, 5, 5]), torch.tensor([3, 4, 3, 4, 3, 4])
    drawn = sample(logits, positions, params, sequence_ids=ids)
    assert len(set(drawn.tolist())) == 6
    order = torch.tensor([4, 0, 2])
    assert torch.equal(sample(logits[:3], positions[order], params, sequence_ids=ids[order]), drawn[order])
    assert not torch.equal(sample(logits, positions, SamplingParams(seed=2), sequence_ids=ids), drawn)
    assert torch.equal(sample(logits, positions), sample(logits, positions, sequence_ids=torch.arange(6)))


def test_the_draws_do_not_change_between_releases() -> None:
    # Another machine and a later release generate the same text.
    drawn = sample(torch.zeros(2, 50_000), torch.tensor([7, 7]))
    assert drawn.tolist() == [13012, 6563]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_impossible_tokens_are_never_drawn(dtype: torch.dtype) -> None:
    logits = torch.full((500, 9), float("-inf"), dtype=dtype)
    logits[:, 4], logits[:, 7] = 1.0, 1.0
    for options in SETTINGS.values():
        assert set(sample(logits, torch.arange(500), SamplingParams(**options)).tolist()) <= {4, 7}


def test_one_error_lists_every_setting_that_is_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"temperature is -1.*top_k is 0.*top_p is 0"):
        SamplingParams(temperature=-1, top_k=0, top_p=0)
    with pytest.raises(ValueError, match="temperature is nan"):
        SamplingParams(temperature=float("nan"))
