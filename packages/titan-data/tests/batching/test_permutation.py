"""Permutation: one to one, fixed for all time, and without a visible pattern."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_data import DataError, Permutation


@settings(deadline=None)
@given(n=st.integers(0, 2000), key=st.one_of(st.text(), st.binary()))
def test_bijection(n: int, key: str | bytes) -> None:
    assert sorted(Permutation(n, key)) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(1, 2**62), data=st.data())
def test_large_n_stays_in_range_and_distinct(n: int, data: st.DataObject) -> None:
    permutation = Permutation(n, "key")
    indices = data.draw(st.sets(st.integers(0, n - 1), max_size=20))
    images = {permutation[index] for index in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < n for image in images)


def test_entries_are_fixed_for_all_time() -> None:
    # A saved run depends on these very numbers: a change here breaks the order of everybody's data.
    assert list(Permutation(10, "42/0")) == GOLDEN_10
    assert [Permutation(10**12, b"key")[i] for i in range(3)] == GOLDEN_LARGE


GOLDEN_10 = [0, 1, 7, 3, 6, 8, 4, 9, 2, 5]
GOLDEN_LARGE = [372451430681, 483106680149, 690050753735]


@settings(deadline=None)
@given(n=st.integers(1, 3000), start=st.integers(0, 3000), size=st.integers(0, 500))
def test_many_entries_are_those_one_by_one(n: int, start: int, size: int) -> None:
    permutation = Permutation(n, "key")
    assert permutation.entries(start, start + size).tolist() == list(permutation)[start : start + size]


def test_another_key_gives_another_order() -> None:
    orders = {tuple(Permutation(50, f"{seed}/{epoch}")) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_str_and_bytes_keys_agree() -> None:
    assert list(Permutation(20, "é")) == list(Permutation(20, "é".encode()))


def test_looks_random() -> None:
    n = 10_000
    order = list(Permutation(n, "x"))
    # A random order keeps about one neighbour pair and one fixed point; its ascents are about half.
    assert sum(b - a == 1 for a, b in pairwise(order)) < 10
    assert sum(i == image for i, image in enumerate(order)) < 10
    assert abs(sum(b > a for a, b in pairwise(order)) / n - 0.5) < 0.02
    # The early half of the indices goes to both halves of the range alike.
    assert abs(sum(image < n // 2 for image in order[: n // 2]) / (n // 2) - 0.5) < 0.05


def test_small_permutations_are_all_reached_about_equally() -> None:
    counts = {}
    for key in range(1200):
        order = tuple(Permutation(3, str(key)))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert max(counts.values()) < 2 * min(counts.values())


def test_bad_use() -> None:
    for n in (-1, 2**62 + 1):
        with pytest.raises(DataError, match=f"n from 0 to 2\\^62, not {n}"):
            Permutation(n, "x")
    for index in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(5, "x")[index]
