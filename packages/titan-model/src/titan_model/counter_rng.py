"""Counter-based random numbers, a function of (key, index): any slice of a tensor can be drawn on its own.

Used by `init` for initial weights and by `generation.sampling` for tokens. The generator is SplitMix64 (Steele, Lea &
Flood 2014, "Fast splittable pseudorandom number generators") with a counter as its state: number `i` of a stream is a
hash of `key + (i + 1) * golden`. Integers wrap modulo 2**64 on every device, so CPU and GPU draw the same bits; the
float64 results computed from them agree up to the last place.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stream_key(seed: int, name: str) -> int:
    """Return the 64-bit key of the stream of (seed, name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def random_bits(key: int, indices: Tensor) -> Tensor:
    """Return the 64 random bits of each index.

    Args:
        key: The stream, 0 to 2**64 - 1.
        indices: int64 of any shape, from 0.

    Returns:
        int64 of the same shape, of which all 64 bits are random.
    """
    z = (indices + 1) * _signed(_GOLDEN) + _signed(key)
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def uniform(key: int, indices: Tensor) -> Tensor:
    """Return uniform random numbers in the open interval (0, 1), one for each index.

    Args:
        key: The stream.
        indices: int64 of any shape, from 0.

    Returns:
        float64 of the shape of `indices`.
    """
    # The top 52 bits plus one half: never 0 nor 1. (With 53 bits the half would be rounded away, in the end up to 1.)
    return (_shift_right(random_bits(key, indices), 12).double() + 0.5) * 2.0**-52


def truncated_normal(key: int, indices: Tensor, bound: float) -> Tensor:
    """Return standard normal random numbers truncated at `bound` standard deviations, one for each index.

    The inverse distribution function is applied to a uniform number, so each takes exactly one draw.

    Args:
        key: The stream.
        indices: int64 of any shape, from 0.
        bound: Where both tails are truncated, in standard deviations.

    Returns:
        float64 of the shape of `indices`.
    """
    inside = math.erf(bound / math.sqrt(2))  # probability of the normal within the bounds
    return torch.erfinv((2 * uniform(key, indices) - 1) * inside) * math.sqrt(2)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def _shift_right(z: Tensor, n: int) -> Tensor:
    # int64 shifts are arithmetic: mask out the copies of the sign bit.
    return (z >> n) & ((1 << (64 - n)) - 1)
