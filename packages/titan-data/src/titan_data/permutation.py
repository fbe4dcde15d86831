"""A shuffle of any number of things that fits in a few bytes."""

import hashlib
from collections.abc import Iterator
from math import isqrt

from titan_data.errors import DataError

# Four rounds make a Feistel network look random to any observer; two more cost 2 µs and leave a margin where the
# halves have few values.
_ROUNDS = 6


class Permutation:
    """A pseudo-random bijection of `range(n)`: each entry is computed when asked for, and nothing is stored.

    The entries depend on (n, key) alone: on no random generator of Python or torch, hence on no version of them.

    How: write an index as a pair (left, right) with left < a, right < b and a * b just above n; then in turn add to
    each half a keyed hash of the other half (a Feistel network with modular addition). Each round can be undone, so
    the whole maps the a * b pairs one to one. Where the result is n or more, apply it again until it is below
    ("cycle walking"), which keeps it one to one on `range(n)`. As a * b exceeds n by less than its square root, that
    is rare.

    Args:
        n: how many indices there are.
        key: which permutation; another key gives an unrelated one.

    Raises:
        DataError: n is negative.
    """

    def __init__(self, n: int, key: str | bytes) -> None:
        if n < 0:
            raise DataError(f"a permutation needs n >= 0, not {n}")
        self._n = n
        self._left_size = isqrt(max(n - 1, 0)) + 1  # the square root of n, rounded up
        self._right_size = -(-n // self._left_size)
        raw = key.encode("utf-8") if isinstance(key, str) else key
        self._key = hashlib.blake2b(raw, digest_size=32).digest()  # a hash takes keys of 64 bytes at most

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._n:
            raise IndexError(f"index {index} is outside of range({self._n})")
        index = self._once(index)
        while index >= self._n:
            index = self._once(index)
        return index

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(self._n))

    def _once(self, index: int) -> int:
        """Map range(a * b) to itself, one to one."""
        left, right = divmod(index, self._right_size)
        for number in range(_ROUNDS):
            if number % 2 == 0:
                left = (left + self._hash(number, right)) % self._left_size
            else:
                right = (right + self._hash(number, left)) % self._right_size
        return left * self._right_size + right

    def _hash(self, number: int, half: int) -> int:
        """Return 64 keyed bits of (round number, half)."""
        message = (half << 8 | number).to_bytes(16, "little")
        return int.from_bytes(hashlib.blake2b(message, key=self._key, digest_size=8).digest(), "little")
