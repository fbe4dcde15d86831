"""What selective checkpointing computes once: attention and the products of experts, and every second other one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titan_parallel.activation import checkpoint_block


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Parameter(torch.randn(2, 8, 8)) for _ in range(2))
        self.first, self.second = (nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([3, 6], dtype=torch.int32)
        x = F.grouped_mm(F.silu(F.grouped_mm(x, self.inner, offs=ends)), self.outer, offs=ends)
        x = self.second(F.silu(self.first(F.silu(x))))
        heads = x[None, None]
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sin()


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def computed(mode: Any) -> Counter[str]:
    torch.manual_seed(0)
    block = checkpoint_block(Experts(), mode)
    with Counting() as counting:
        block(torch.randn(6, 8, requires_grad=True)).square().sum().backward()
    return counting.counts


def test_what_is_computed_again() -> None:
    once, selective, full = computed("none"), computed("selective"), computed("full")
    again = {name: selective[name] - count for name, count in once.items()}
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert (again["aten::_grouped_mm"], again[attention], again["aten::mm"]) == (0, 0, 1)
    assert (full["aten::_grouped_mm"] - once["aten::_grouped_mm"], full[attention] - once[attention]) == (2, 1)
    assert full["aten::mm"] - once["aten::mm"] == 2


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_those_without(mode: Any) -> None:
    gradients = []
    for one in ("none", mode):
        torch.manual_seed(0)
        block = checkpoint_block(Experts(), one)
        block(torch.randn(6, 8)).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)
