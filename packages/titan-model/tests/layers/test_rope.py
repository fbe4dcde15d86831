"""Rotary positions: only distances matter, nothing is stretched, and Llama 3.1's scaling is its three rules."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_model import DynamicScaling, Llama3Scaling
from titan_model.fused_ops import rotate
from titan_model.layers.rope import document_lengths, inverse_frequencies, rotation

POSITIONS = st.integers(0, 1000)
HALF_DIMS = st.integers(1, 8)


def turned(x: torch.Tensor, position: int, theta: float = 10_000.0) -> torch.Tensor:
    """Rotate one head `[Dh]` to a position."""
    rope = rotation(torch.tensor([[position]]), inverse_frequencies(x.shape[-1], theta, None))
    return rotate(x[None, None, None], rope)[0, 0, 0]


def random_head(half_dim: int, seed: int) -> torch.Tensor:
    return torch.randn(2 * half_dim, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(half_dim=HALF_DIMS, first=POSITIONS, second=POSITIONS, shift=POSITIONS)
def test_scores_depend_on_the_distance_alone(half_dim: int, first: int, second: int, shift: int) -> None:
    q, k = random_head(half_dim, 0), random_head(half_dim, 1)
    here = turned(q, first) @ turned(k, second)
    there = turned(q, first + shift) @ turned(k, second + shift)
    torch.testing.assert_close(here, there, rtol=0, atol=2e-3)  # fp32 angles of up to 2,000 radians


@settings(deadline=None)
@given(half_dim=HALF_DIMS, position=POSITIONS)
def test_each_pair_turns_by_its_angle(half_dim: int, position: int) -> None:
    x = random_head(half_dim, 2)
    out = turned(x, position)
    for i in range(half_dim):
        before, after = complex(x[i], x[i + half_dim]), complex(out[i], out[i + half_dim])
        angle = position * 10_000.0 ** (-i / half_dim)
        assert abs(after - before * complex(math.cos(angle), math.sin(angle))) < 1e-3


def test_position_zero_changes_nothing_and_dtype_stays() -> None:
    x = random_head(4, 3)
    assert torch.equal(turned(x, 0), x)
    assert turned(x.bfloat16(), 5).dtype == torch.bfloat16
    # The turn itself is in fp32: only the result is rounded.
    assert torch.equal(turned(x.bfloat16(), 5), turned(x.bfloat16().float(), 5).bfloat16())


@settings(deadline=None)
@given(
    half_dim=HALF_DIMS,
    theta=st.floats(100.0, 1e6),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    gap=st.floats(0.5, 8.0),
    context=st.integers(8, 10_000),
)
def test_scaling_is_the_three_rules(
    half_dim: int, theta: float, factor: float, low: float, gap: float, context: int
) -> None:
    scaling = Llama3Scaling(factor=factor, low_freq_factor=low, high_freq_factor=low + gap, original_context=context)
    got = inverse_frequencies(2 * half_dim, theta, scaling)
    for i, value in enumerate(got.tolist()):
        frequency = theta ** (-i / half_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < context / (low + gap):
            expected = frequency
        elif wavelength > context / low:
            expected = frequency / factor
        else:
            smooth = (context / wavelength - low) / gap
            expected = (1 - smooth) * frequency / factor + smooth * frequency
        assert math.isclose(value, expected, rel_tol=1e-4)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_each_token_knows_how_long_its_document_is(lengths: list[int]) -> None:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert document_lengths(positions).tolist() == [[n for n in lengths for _ in range(n)]]


def test_dynamic_scaling_begins_beyond_the_original_context() -> None:
    scaling = DynamicScaling(factor=2.0, original_context=16)
    plain = inverse_frequencies(8, 100.0, None)
    found = inverse_frequencies(8, 100.0, scaling, lengths=torch.tensor([[1, 16, 17, 64]]))[0, :, 0]
    torch.testing.assert_close(found[:2], torch.stack([plain, plain]))
    assert (found[2, 1:] < plain[1:]).all()
    # The base of 64 tokens is 100 * (2 * 64 / 16 - 1) ** (8 / 6).
    torch.testing.assert_close(found[3], inverse_frequencies(8, 100.0 * 7.0 ** (8 / 6), None))
