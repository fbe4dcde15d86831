"""The summed loss against the formula, in fp32, over scored tokens only."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_model import cross_entropy_sum

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9))


def batch(sizes: tuple[int, int, int], seed: int, scored: float = 0.7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*sizes, generator=generator) * 3
    labels = torch.randint(0, sizes[2], sizes[:2], generator=generator)
    labels[torch.rand(sizes[:2], generator=generator) > scored] = -100
    return logits, labels


def by_formula(logits: Tensor, labels: Tensor) -> float:
    """Return the sum of -log softmax at the label, in Python floats."""
    total = 0.0
    for row, label in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        if label != -100:
            largest = max(row)
            total += largest + math.log(sum(math.exp(x - largest) for x in row)) - row[label]
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_sum_by_formula_in_fp32(dtype: torch.dtype, sizes: tuple[int, int, int], seed: int) -> None:
    logits, labels = batch(sizes, seed)
    logits = logits.to(dtype)
    loss = cross_entropy_sum(logits, labels)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    # Half precision is lost in the logits, not in the sum: the formula runs on the same rounded logits.
    assert float(loss) == pytest.approx(by_formula(logits, labels), rel=1e-5, abs=1e-5)


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_unscored_tokens_count_for_nothing(sizes: tuple[int, int, int], seed: int) -> None:
    logits, labels = batch(sizes, seed)
    noise = torch.where((labels == -100)[..., None], torch.full_like(logits, 77.0), logits).requires_grad_()
    loss = cross_entropy_sum(noise, labels)
    assert torch.equal(loss, cross_entropy_sum(logits, labels))
    loss.backward()
    assert noise.grad is not None
    assert torch.equal(noise.grad[labels == -100], torch.zeros_like(noise.grad[labels == -100]))
    if sizes[2] > 1:
        assert bool((noise.grad[labels != -100] != 0).any(-1).all())


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_rows_add_up(sizes: tuple[int, int, int], seed: int) -> None:
    # A sum, not a mean: microbatches and ranks may be split anyhow.
    logits, labels = batch(sizes, seed)
    parts = [float(cross_entropy_sum(x[None], y[None])) for x, y in zip(logits, labels, strict=True)]
    assert float(cross_entropy_sum(logits, labels)) == pytest.approx(sum(parts), rel=1e-5, abs=1e-5)


def test_nothing_scored_is_zero_and_differentiable() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 3, 5))
