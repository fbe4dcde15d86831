"""A shuffle of any number of items in constant memory. Used by the order of epochs and of best-fit windows."""

import hashlib
from collections.abc import Iterator
from math import isqrt

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError

# Four rounds make a Feistel network indistinguishable from random; two more cost little and leave a margin for halves
# with few values.
_ROUNDS = 6
_MAX = 1 << 62  # so that each half stays below 2^32, and its product with 32 random bits below 2^64


class Permutation:
    """A pseudo-random bijection of `range(n)`; entries are computed when they are asked for, nothing is stored.

    The entries depend on (n, key) alone, not on a random generator of Python, numpy or torch or its version.

    How: an index is written as a pair (left, right) with left < a, right < b and a * b just above n; then a keyed hash
    of each half is added to the other half in turn (a Feistel network with modular addition). Each round can be undone,
    so the network permutes the a * b pairs. A result of n or more is permuted again until it is below n ("cycle
    walking"), which leaves a bijection of `range(n)`. As a * b exceeds n by less than its square root, that is rare.
    The hash is the finalizer of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014)
    of the half plus a key of the round: integer arithmetic that numpy vectorizes.

    Args:
        n: Number of indices, at most 2^62.
        key: Selects the permutation; different keys give unrelated ones.

    Raises:
        DataError: If n is negative or too large.
    """

    def __init__(self, n: int, key: str | bytes) -> None:
        if not 0 <= n <= _MAX:
            raise DataError(f"a permutation needs n from 0 to 2^62, not {n}")
        self._n = n
        self._left_size = isqrt(max(n - 1, 0)) + 1  # the square root of n, rounded up
        self._right_size = -(-n // self._left_size)
        raw = key.encode("utf-8") if isinstance(key, str) else key
        digest = hashlib.blake2b(raw, digest_size=8 * _ROUNDS).digest()
        self._round_keys = [np.uint64(value) for value in np.frombuffer(digest, dtype="<u8")]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._n:
            raise IndexError(f"index {index} is outside range({self._n})")
        return int(self.entries(index, index + 1)[0])

    def __iter__(self) -> Iterator[int]:
        return (int(entry) for begin in range(0, self._n, 1024) for entry in self.entries(begin, begin + 1024))

    def entries(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Compute many entries at once, at some 0.1 µs per entry.

        Args:
            start: The first index.
            stop: The index after the last; at most `len(self)` is used.

        Returns:
            int64 `[stop - start]`.
        """
        entries = self._once(np.arange(start, min(stop, self._n), dtype=np.uint64))
        while (outside := entries >= self._n).any():
            entries[outside] = self._once(entries[outside])
        return entries.astype(np.int64)

    def _once(self, indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Permute range(a * b)."""
        left, right = np.divmod(indices, np.uint64(max(self._right_size, 1)))
        for number, key in enumerate(self._round_keys):
            if number % 2 == 0:
                left = _add_hash(left, right + key, np.uint64(self._left_size))
            else:
                right = _add_hash(right, left + key, np.uint64(self._right_size))
        return left * np.uint64(self._right_size) + right


def _add_hash(half: npt.NDArray[np.uint64], keyed: npt.NDArray[np.uint64], size: np.uint64) -> npt.NDArray[np.uint64]:
    """Return `half` plus a hash of `keyed`, modulo `size`."""
    mixed = keyed ^ (keyed >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    # The upper 32 bits as a fraction of `size`: a modulo without a division.
    total = half + ((mixed >> np.uint64(32)) * size >> np.uint64(32))
    return np.where(total >= size, total - size, total)
