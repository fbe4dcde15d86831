"""The examples in docstrings run as printed."""

import doctest
import importlib

import pytest

MODULES = ["titan_data.loader", "titan_data.files.load", "titan_data.shards.prepare", "titan_data.tokenizers.load"]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
