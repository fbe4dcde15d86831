"""What passes between the stages of a pipeline, and how the first stage finds it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, full
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


@dataclass(frozen=True)
class Like:
    """What is known of a tensor on a rank that has it not: whole shape and stride, dtype, tensor-parallel layout."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...] | None

    @classmethod
    def of(cls, x: Tensor) -> Like:
        """Describe a tensor."""
        return cls(x.shape, x.stride(), x.dtype, x.placements if isinstance(x, DTensor) else None)

    def unknown(self, device: torch.device, mesh: DeviceMesh) -> Tensor:
        """Return a tensor of this description: of numbers that show wherever they are used, if its dtype has some."""
        value = math.nan if self.dtype.is_floating_point else 0
        if self.placements is None:
            return torch.full(self.shape, value, dtype=self.dtype, device=device)
        return full(self.shape, value, dtype=self.dtype, device_mesh=mesh, placements=self.placements)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Hidden:
    """Stands for the hidden state in the output of a block."""


@dataclass(frozen=True)
class Boundary:
    """What passes between stages, and what has to be known of the modules that are elsewhere.

    Attributes:
        hidden: The first argument of every block.
        local: Shape of what one rank holds and sends of it.
        stand_ins: For each module before the blocks, what each of its calls in one forward returns, in `Like`.
        block_output: What a block returns, `Hidden` and `Like` in the place of tensors.
    """

    hidden: Like
    local: torch.Size
    stand_ins: dict[str, list[Any]]
    block_output: Any


@dataclass
class Probe:
    """What the first stage finds out in one forward up to the first block."""

    hidden: Tensor | None = None
    output: Any = None
    stand_ins: dict[str, list[Any]] = field(default_factory=dict)
    complaint: str = ""


def note(probe: Probe, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Note what the model's first block gets and returns, and whether stages could do with that."""
    probe.output = output
    hidden, *others = [*args, *kwargs.values()]
    leaves = tree_leaves(output)
    if not isinstance(hidden, Tensor) or not leaves or not isinstance(leaves[0], Tensor):
        probe.complaint = (
            "a block has to take the hidden state, one tensor, as its first argument and return it first, for "
            f"pipeline stages to exchange it; this model's takes a {type(hidden).__name__} and returns a "
            f"{type(output).__name__}"
        )
        return
    probe.hidden = hidden
    found, wanted = Like.of(leaves[0]), Like.of(hidden)
    if (found.shape, found.dtype, found.placements) != (wanted.shape, wanted.dtype, wanted.placements):
        probe.complaint = f"blocks have to keep the hidden state's shape, dtype and layout: {wanted} becomes {found}"
    elif any(isinstance(x, Tensor) and x.requires_grad for x in [*tree_leaves(others), *leaves[1:]]):
        probe.complaint = (
            "pipeline stages exchange the first argument of their blocks alone, but the first block gets or returns "
            "another tensor that depends on parameters: take pp 1, or compute it inside each block"
        )


def template(output: Any) -> Any:
    """Return what a block returns with `Hidden` and `Like` in the place of tensors."""
    leaves, spec = tree_flatten(output)
    described = [Like.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten([Hidden(), *described[1:]], spec)


@contextmanager
def noting_outputs(model: nn.Module, names: Sequence[str], outputs: dict[str, list[Any]]) -> Iterator[None]:
    """Note what each call of modules returns, in `Like`, under their names."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append(tree_map_only(Tensor, Like.of, output))

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a block is called with first."""
    return args[0] if args else next(iter(kwargs.values()))
