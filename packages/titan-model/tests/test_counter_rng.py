"""The counter generator against SplitMix64 written anew, and its normal numbers against theory."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_model.counter_rng import random_bits, stream_key, truncated_normal

WORD = 1 << 64
KEYS = st.integers(0, WORD - 1)
INDICES = st.integers(0, 2**63 - 2)
DRAWS = 1_000_000


class SplitMix64:
    """The sequential generator as its authors give it: a state that moves by a constant, and a mix of it."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % WORD
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
        return z ^ (z >> 31)

    def jump(self, steps: int) -> None:
        self.state = (self.state + steps * 0x9E3779B97F4A7C15) % WORD


def unsigned(bits: Tensor) -> list[int]:
    return [value % WORD for value in bits.tolist()]


def key_of_bits(bits: int) -> int:
    """Return the key whose number 0 is `bits`: each step of the mix undone, last first."""
    z = unshift(bits, 31)
    z = unshift(z * pow(0x94D049BB133111EB, -1, WORD) % WORD, 27)
    z = unshift(z * pow(0xBF58476D1CE4E5B9, -1, WORD) % WORD, 30)
    return (z - 0x9E3779B97F4A7C15) % WORD


def unshift(y: int, n: int) -> int:
    """Solve `x ^ (x >> n) == y`."""
    x = y
    for _ in range(64 // n + 1):
        x = y ^ (x >> n)
    return x


def test_published_first_numbers_of_seed_zero() -> None:
    assert unsigned(random_bits(0, torch.arange(3))) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(deadline=None)
@given(key=KEYS, count=st.integers(1, 50))
def test_a_stream_is_the_sequence(key: int, count: int) -> None:
    sequence = SplitMix64(key)
    assert unsigned(random_bits(key, torch.arange(count))) == [sequence.next() for _ in range(count)]


@settings(deadline=None)
@given(key=KEYS, indices=st.lists(INDICES, min_size=1, max_size=20))
def test_any_index_is_drawn_by_itself(key: int, indices: list[int]) -> None:
    expected = []
    for index in indices:
        sequence = SplitMix64(key)
        sequence.jump(index)
        expected.append(sequence.next())
    assert unsigned(random_bits(key, torch.tensor(indices))) == expected
    # The shape of the indices is that of the result, and nothing else.
    assert unsigned(random_bits(key, torch.tensor([indices]))[0]) == expected


@pytest.mark.parametrize("bound", [0.5, 3.0, 9.0])
@settings(deadline=None)
@given(bits=st.one_of(KEYS, st.sampled_from([0, WORD - 1, WORD >> 1, (WORD >> 1) - 1])))
def test_normal_numbers_stay_within_bounds_at_any_bits(bound: float, bits: int) -> None:
    key = key_of_bits(bits)
    assert unsigned(random_bits(key, torch.zeros(1, dtype=torch.long))) == [bits]
    value = float(truncated_normal(key, torch.zeros(1, dtype=torch.long), bound))
    assert math.isfinite(value)
    # Strictly inside, up to the last place of the inverse error function.
    assert abs(value) <= bound * (1 + 1e-12)


@settings(deadline=None)
@given(key=KEYS, index=INDICES)
def test_normal_number_is_the_inverse_distribution_of_the_bits(key: int, index: int) -> None:
    sequence = SplitMix64(key)
    sequence.jump(index)
    uniform = (sequence.next() + 0.5) / WORD
    normal = NormalDist()
    low, high = normal.cdf(-3.0), normal.cdf(3.0)
    expected = normal.inv_cdf(low + uniform * (high - low))
    assert float(truncated_normal(key, torch.tensor(index), 3.0)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.fixture(scope="module", params=[3.0, 1.0])
def sample(request: pytest.FixtureRequest) -> tuple[float, Tensor]:
    """Return a bound and a million numbers."""
    return request.param, truncated_normal(stream_key(0, "embed.weight"), torch.arange(DRAWS), request.param)


def test_bounds_mean_and_deviation(sample: tuple[float, Tensor]) -> None:
    bound, x = sample
    assert x.dtype == torch.float64
    assert x.abs().max() <= bound
    assert x.abs().max() > 0.99 * bound  # the whole range is reached
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    deviation = math.sqrt(1 - 2 * bound * density / math.erf(bound / math.sqrt(2)))
    assert abs(float(x.mean())) < 4 * deviation / math.sqrt(DRAWS)
    assert float(x.std()) == pytest.approx(deviation, rel=3e-3)


def test_kolmogorov_smirnov(sample: tuple[float, Tensor]) -> None:
    bound, x = sample
    ordered = x.sort().values
    cdf = (torch.erf(ordered / math.sqrt(2)) / math.erf(bound / math.sqrt(2)) + 1) / 2
    steps = torch.arange(DRAWS + 1, dtype=torch.float64) / DRAWS
    distance = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max()))
    assert distance < 1.63 / math.sqrt(DRAWS)  # what a true sample stays under in 99 of 100 cases


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])


def test_streams_are_uncorrelated() -> None:
    n = 100_000
    names = [(seed, name) for seed in (0, 1, 2**40) for name in ("embed.weight", "head.weight", "layers.1.attn.q_proj")]
    streams = [truncated_normal(stream_key(seed, name), torch.arange(n), 3.0) for seed, name in names]
    for i, first in enumerate(streams):
        for second in streams[:i]:
            assert abs(correlation(first, second)) < 5 / math.sqrt(n)
        for lag in (1, 2, 64, 4096):  # neighbors, and rows of usual widths
            assert abs(correlation(first[lag:], first[:-lag])) < 5 / math.sqrt(n)


def test_every_bit_is_fair() -> None:
    n = 100_000
    bits = random_bits(stream_key(0, "x"), torch.arange(n))
    for place in range(64):
        share = float(((bits >> place) & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(n)


@settings(deadline=None)
@given(pairs=st.sets(st.tuples(st.integers(0, 1000), st.text(max_size=8)), min_size=2, max_size=30))
def test_keys_differ_and_fit_64_bits(pairs: set[tuple[int, str]]) -> None:
    keys = sorted(stream_key(seed, name) for seed, name in pairs)
    assert all(first < second for first, second in pairwise(keys))
    assert keys[0] >= 0
    assert keys[-1] < WORD


def test_keys_are_fixed_for_all_time() -> None:
    # Every run's initial weights depend on these: a change here changes what everybody's seed means.
    assert stream_key(42, "embed.weight") == 5170493689514808793
    assert stream_key(0, "layers.0.attn.q_proj.weight") == 5240251979744343295
