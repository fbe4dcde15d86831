"""Which results activation checkpointing keeps, and which it recomputes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titan_parallel import LayoutError, ParallelOptions
from titan_parallel.activation_checkpoint import checkpoint_block, checkpoint_blocks
from titan_parallel.compile import compile_blocks

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
BLOCKS = 4


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


class Wide(nn.Module):
    """Has something to keep: 8 numbers in, 64 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(torch.sin(x))))


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def computed(wrap: Callable[[nn.Module], nn.Module]) -> Counter[str]:
    torch.manual_seed(0)
    block = wrap(Experts())
    with Counting() as counting:
        block(torch.randn(6, 8, requires_grad=True)).square().sum().backward()
    return counting.counts


def kept(options: ParallelOptions) -> tuple[int, Tensor]:
    """Return the bytes that a forward of `BLOCKS` blocks keeps for its backward, weights apart, and a gradient."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(*[Wide() for _ in range(BLOCKS)])
    names = [str(i) for i in range(BLOCKS)]
    checkpoint_blocks(model, names, options, ())
    if options.compile_blocks:
        compile_blocks(model, names, options)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(torch.randn(16, 8)).square().sum()
    total = sum(x.untyped_storage().nbytes() for x in seen.values())
    loss.backward()
    gradient = model[0].get_submodule("_checkpoint_wrapped_module" if options.checkpoint_every > 1 else "")
    return total, next(gradient.parameters()).grad


def test_what_is_computed_again() -> None:
    once = computed(lambda block: block)
    selective = computed(lambda block: checkpoint_block(block, frozenset()))
    full = computed(lambda block: checkpoint_block(block, None))
    again = {name: selective[name] - count for name, count in once.items()}
    assert (again["aten::_grouped_mm"], again[ATTENTION], again["aten::mm"], again["aten::silu"]) == (0, 0, 1, 3)
    assert (full["aten::_grouped_mm"] - once["aten::_grouped_mm"], full[ATTENTION] - once[ATTENTION]) == (2, 1)
    assert full["aten::mm"] - once["aten::mm"] == 2


def test_operators_that_the_user_or_the_plan_names() -> None:
    def wrapped(options: ParallelOptions, save: list[str]) -> Counter[str]:
        def wrap(block: nn.Module) -> nn.Module:
            model = nn.Sequential(block)
            checkpoint_blocks(model, ["0"], options, save)
            return model

        return computed(wrap)

    once = computed(lambda block: block)
    for save_ops, save in ((("aten.mm", "aten.silu"), []), (("aten.silu",), ["aten.mm"])):
        options = ParallelOptions(activation_checkpointing="selective", save_ops=save_ops)
        counts = wrapped(options, save)
        assert (counts["aten::mm"], counts["aten::silu"]) == (once["aten::mm"], once["aten::silu"])


@pytest.mark.parametrize("save", [None, frozenset(), frozenset({"aten.silu"})], ids=["full", "selective", "named"])
def test_gradients_are_those_without(save: frozenset[str] | None) -> None:
    gradients = []
    for wrap in (lambda block: block, lambda block: checkpoint_block(block, save)):
        torch.manual_seed(0)
        block = wrap(Experts())
        block(torch.randn(6, 8)).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)


def test_every_second_block_keeps_what_the_others_do_not() -> None:
    every, expected = kept(ParallelOptions())
    none, _ = kept(ParallelOptions(activation_checkpointing="full"))
    half, gradient = kept(ParallelOptions(activation_checkpointing="full", checkpoint_every=2))
    third, _ = kept(ParallelOptions(activation_checkpointing="full", checkpoint_every=3))
    assert 4 * none < every
    # The first of each 2, and of each 3, of 4 blocks: 2 of them both times.
    assert half == third
    assert none + (every - none) * 0.45 < half < none + (every - none) * 0.55
    torch.testing.assert_close(gradient, expected)


def test_a_budget_is_kept_to_and_is_that_of_these_blocks_alone() -> None:
    from torch._functorch import config

    def compiled(budget: float | None) -> tuple[int, Tensor]:
        mode = "none" if budget is None else "budget"
        return kept(
            ParallelOptions(
                activation_checkpointing=mode,
                memory_budget=budget,
                compile_blocks=True,
                compile_backend="aot_eager",
            )
        )

    whole, expected = compiled(None)
    sizes = []
    for budget in (1.0, 0.6, 0.0):
        size, gradient = compiled(budget)
        torch.testing.assert_close(gradient, expected)
        sizes.append(size)
        assert config.activation_memory_budget == 1.0
    assert sizes[0] == whole
    assert sizes[1] <= 0.6 * whole
    assert 0 < sizes[2] < sizes[1]


def test_operators_that_are_not_there() -> None:
    options = ParallelOptions(activation_checkpointing="selective", save_ops=("aten.silo", "mine.own"))
    with pytest.raises(LayoutError, match=r"'aten\.silo' \(nearest: aten\.silu.*'mine\.own' \(nearest: none\)"):
        checkpoint_blocks(nn.Sequential(Wide()), ["0"], options, ())


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (
            {"activation_checkpointing": "some"},
            "activation_checkpointing: 'some' is not one of ['none', 'full', 'selective', 'budget']",
        ),
        (
            {"checkpoint_every": 2},
            "checkpoint_every: requires activation_checkpointing 'full'",
        ),
        ({"activation_checkpointing": "full", "checkpoint_every": 0}, "checkpoint_every: 0 is not"),
        (
            {"activation_checkpointing": "full", "save_ops": ("aten.mm",)},
            "save_ops: requires activation_checkpointing 'selective', not 'full'",
        ),
        ({"activation_checkpointing": "budget", "memory_budget": 0.5}, "set compile_blocks too"),
        (
            {"activation_checkpointing": "budget", "compile_blocks": True},
            "memory_budget: is None while activation_checkpointing is 'budget'; set both",
        ),
        ({"memory_budget": 0.5}, "memory_budget: is 0.5 while activation_checkpointing is 'none'; set both"),
        (
            {"activation_checkpointing": "budget", "memory_budget": 2.0, "compile_blocks": True},
            "memory_budget: 2.0 is not a fraction",
        ),
    ],
)
def test_contradictions(chosen: dict, says: str) -> None:
    with pytest.raises(LayoutError) as refused:
        ParallelOptions(**chosen)
    assert says in str(refused.value)
