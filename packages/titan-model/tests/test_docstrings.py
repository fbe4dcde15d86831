"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import titan_model

MODULES = [info.name for info in pkgutil.walk_packages(titan_model.__path__, "titan_model.")]
WITH_EXAMPLES = ("build", "flops_per_token", "generate", "linear_cross_entropy", "load_huggingface")


def test_the_main_functions_have_an_example() -> None:
    assert [name for name in WITH_EXAMPLES if ">>> " not in (getattr(titan_model, name).__doc__ or "")] == []


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
