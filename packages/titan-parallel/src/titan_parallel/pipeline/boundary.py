"""Metadata of what stages of a pipeline exchange, and how the first stage records it.

`Stage.infer_boundary` makes a `Boundary` from a `Probe`; `stage_modules` and `transfer` use it.
"""

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

from titan_parallel._torch_compat import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


@dataclass(frozen=True)
class TensorMeta:
    """Metadata of a tensor that is on another rank: full shape and stride, dtype, tensor-parallel placements."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...] | None

    @classmethod
    def of(cls, x: Tensor) -> TensorMeta:
        """Describe a tensor."""
        return cls(x.shape, x.stride(), x.dtype, x.placements if isinstance(x, DTensor) else None)

    def unknown(self, device: torch.device, mesh: DeviceMesh) -> Tensor:
        """Return a tensor with this metadata, filled with NaN if the dtype has it, so that any use of it shows."""
        value = math.nan if self.dtype.is_floating_point else 0
        if self.placements is None:
            return torch.full(self.shape, value, dtype=self.dtype, device=device)
        return full(self.shape, value, dtype=self.dtype, device_mesh=mesh, placements=self.placements)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class HiddenState:
    """Placeholder of the hidden state in the output of a block."""


@dataclass(frozen=True)
class Boundary:
    """What stages exchange, and what a stage must know about modules on other stages.

    Attributes:
        hidden: The first argument of every block.
        local: Shape of the local part, which one rank holds and sends.
        stand_ins: For each module before the blocks, the output of each of its calls in one forward, with `TensorMeta`
            in the place of tensors.
        block_output: Output of a block, with `HiddenState` and `TensorMeta` in the place of tensors.
    """

    hidden: TensorMeta
    local: torch.Size
    stand_ins: dict[str, list[Any]]
    block_output: Any


@dataclass
class Probe:
    """What the first stage records in one forward up to the first block."""

    hidden: Tensor | None = None
    output: Any = None
    stand_ins: dict[str, list[Any]] = field(default_factory=dict)
    complaint: str = ""


def record_block(probe: Probe, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Record input and output of the model's first block, and whether pipeline stages support them."""
    probe.output = output
    hidden, *others = [*args, *kwargs.values()]
    leaves = tree_leaves(output)
    if not isinstance(hidden, Tensor) or not leaves or not isinstance(leaves[0], Tensor):
        probe.complaint = (
            "pipeline stages exchange the hidden state: a block must take it, one tensor, as its first argument and "
            f"return it first, but this model's block takes a {type(hidden).__name__} and returns a "
            f"{type(output).__name__}; set pp=1"
        )
        return
    probe.hidden = hidden
    found, wanted = TensorMeta.of(leaves[0]), TensorMeta.of(hidden)
    if (found.shape, found.dtype, found.placements) != (wanted.shape, wanted.dtype, wanted.placements):
        probe.complaint = (
            f"blocks must keep the hidden state's shape, dtype and placements, but {wanted} becomes {found}"
        )
    elif any(isinstance(x, Tensor) and x.requires_grad for x in [*tree_leaves(others), *leaves[1:]]):
        probe.complaint = (
            "pipeline stages exchange only the first argument of their blocks, but the first block gets or returns "
            "another tensor that depends on parameters; set pp=1, or compute it inside each block"
        )


def template(output: Any) -> Any:
    """Return a block's output with `HiddenState` and `TensorMeta` in the place of tensors."""
    leaves, spec = tree_flatten(output)
    described = [TensorMeta.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten([HiddenState(), *described[1:]], spec)


@contextmanager
def recording_outputs(model: nn.Module, names: Sequence[str], outputs: dict[str, list[Any]]) -> Iterator[None]:
    """Record the output of each call of the modules `names`, with `TensorMeta` in the place of tensors."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append(tree_map_only(Tensor, TensorMeta.of, output))

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))
