"""The examples in docstrings run as they are written."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import titan_parallel
from titan_parallel import build_mesh, context_attention, parallelize, plan_from_transformers


@pytest.fixture
def process_group() -> Iterator[None]:
    """One process in a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "function", [build_mesh, parallelize, context_attention, plan_from_transformers], ids=lambda one: one.__name__
)
def test_examples(function: Callable[..., Any], process_group: None) -> None:
    if function is plan_from_transformers:
        pytest.importorskip("transformers")
    names = {name: getattr(titan_parallel, name) for name in titan_parallel.__all__}
    found = doctest.DocTestFinder().find(function, function.__name__, globs={**names, "torch": torch, "nn": nn, "F": F})
    examples = [test for test in found if test.examples]
    assert examples
    for test in examples:
        shown: list[str] = []
        failed, _ = doctest.DocTestRunner().run(test, out=shown.append)
        assert not failed, "".join(shown)
