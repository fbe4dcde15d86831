"""The examples in docstrings, as they stand."""

from __future__ import annotations

import doctest

import titan_train.settings


def test_examples() -> None:
    results = doctest.testmod(titan_train.settings)
    assert results.failed == 0
    assert results.attempted >= 2
