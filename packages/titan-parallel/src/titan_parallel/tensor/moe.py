"""Tensor parallelism of a mixture of experts.

A mixture gets the full sequence on every rank, as regular tensors. The experts and weights of each token are computed
identically on every rank. The experts, and a feed-forward beside them, are split over their inner width, so that the
output of the mixture on each rank is one part of a sum over the ranks.

In backward each rank then has one part of every gradient, down to the mixture's input, where the parts are summed. Only
inside the router are gradients complete: it may have its own loss, which must count once, not once per rank.

`styles` calls `split_mixture` for each module of style `mixture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from titan_parallel._torch_compat import AsyncCollectiveTensor, all_reduce_sum, tree_map_only
from titan_parallel.errors import LayoutError
from titan_parallel.tensor.local_parameters import Use, read_locally


def split_mixture(
    name: str, mixture: nn.Module, mesh: DeviceMesh, styles: Mapping[str, str], between: Placement
) -> None:
    """Split a mixture of experts in place.

    Args:
        name: Its name, for messages.
        mixture: The module, called with activations `[B, S, ...]`; returns one tensor of that shape.
        mesh: The one-dimensional tensor-parallel mesh.
        styles: Names of its modules and parameters, relative to it, to styles of `ParallelPlan.tensor`.
        between: Placement of activations between blocks.

    Raises:
        LayoutError: If a style does not fit its module or parameter.
    """
    splits: dict[str, tuple[Placement, Use]] = {}
    wrong: list[str] = []
    for key, parameter in mixture.named_parameters():
        style = _style(key, styles)
        if style is None:
            continue  # reported with the parameters outside of mixtures
        split = _split(mixture, key, parameter, style)
        if split is None:
            wrong.append(f"'{name}.{key}' {list(parameter.shape)} cannot be {style!r}")
            continue
        splits[key] = split
        dim = split[0].dim if isinstance(split[0], Shard) else None
        if dim is not None and parameter.shape[dim] % mesh.size():
            wrong.append(f"tp {mesh.size()} does not divide dim {dim} of '{name}.{key}' {list(parameter.shape)}")
    if wrong:
        raise LayoutError(f"plan['tensor'] in the mixture {name!r}: {'; '.join(wrong)}. {_HINT}")

    for prefix, module in mixture.named_modules():
        uses: dict[str, Use] = {}
        for key, parameter in list(module.named_parameters(recurse=False)):
            if (split := splits.get(f"{prefix}.{key}".lstrip("."))) is not None:
                placement, uses[key] = split
                placed = distribute_tensor(parameter, mesh, [placement])
                module.register_parameter(key, nn.Parameter(placed, requires_grad=parameter.requires_grad))
        read_locally(module, uses)
    for key, style in styles.items():
        if style == "router":
            router = mixture.get_submodule(key)
            router.register_forward_pre_hook(partial(_scale_gradients, 1 / mesh.size()), with_kwargs=True)
            router.register_forward_hook(partial(_sum_gradients, mesh.get_group().group_name))
    mixture.register_forward_pre_hook(partial(_gather_inputs, mesh), with_kwargs=True)
    mixture.register_forward_hook(partial(_sum_outputs, mesh, between))


_HINT = (
    "In a mixture 'colwise' and 'rowwise' split an nn.Linear or, by its name, a parameter [experts, outputs, inputs] "
    "or [experts, outputs]; 'router' is for modules and 'replicate' for parameters that every rank holds in full"
)


def _style(key: str, styles: Mapping[str, str]) -> str | None:
    """Return the style of a parameter: its own, or that of the nearest module above it."""
    while key and key not in styles:
        key = key.rpartition(".")[0]
    return styles.get(key)


def _split(mixture: nn.Module, key: str, parameter: nn.Parameter, style: str) -> tuple[Placement, Use] | None:
    """Return the placement of a parameter and how its rank uses it, or None if the style does not fit."""
    module = mixture.get_submodule(key.rpartition(".")[0])
    if style == "router":
        return Replicate(), "own"
    if style == "replicate":
        return Replicate(), "factor"
    inputs = 1 if isinstance(module, nn.Linear) else 2  # the dim of the inputs of a matrix; biases have none
    if not isinstance(module, nn.Linear) and parameter.ndim not in (2, 3):
        return None
    if style == "colwise":
        return Shard(inputs - 1), "own"
    if style == "rowwise":
        return (Shard(inputs), "own") if parameter.ndim > inputs else (Replicate(), "term")
    return None


def _gather_inputs(
    mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make every tensor a full, regular tensor, whose gradient is a sum over ranks."""

    def gathered(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        elif x.placements[0].is_replicate():
            # Passing through a regular tensor sums the gradient here, and not anywhere further up.
            x = DTensor.from_local(x.to_local(), mesh, x.placements, run_check=False)
        else:
            x = x.redistribute(placements=[Replicate()])
        return _arrived(x.to_local(grad_placements=[Partial()]))

    return tree_map_only(Tensor, gathered, (args, kwargs))  # type: ignore[no-any-return]


def _sum_outputs(mesh: DeviceMesh, layout: Placement, module: nn.Module, args: tuple[Any, ...], output: Any) -> DTensor:
    if not isinstance(output, Tensor):
        raise LayoutError(
            f"a mixture must return one tensor, but {type(module).__name__} returned a {type(output).__name__}"
        )
    return DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(placements=[layout])


def _scale_gradients(
    factor: float, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Scale the gradients that leave a module, equal on all ranks, so that they are parts of a sum again."""
    scaled: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
        Tensor, lambda x: _Scaled.apply(x, factor) if x.is_floating_point() else x, (args, kwargs)
    )
    return scaled


def _sum_gradients(group_name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Sum the gradients that enter a module over ranks, so that they are complete."""
    return tree_map_only(Tensor, lambda x: _Summed.apply(x, group_name) if x.is_floating_point() else x, output)


def _arrived(x: Tensor) -> Tensor:
    """Return `x` once it has arrived: compiled code cannot take a tensor whose collective is still in flight."""
    return _Arrived.apply(x) if isinstance(x, AsyncCollectiveTensor) else x


class _Arrived(torch.autograd.Function):
    # An autograd function, because `wait` alone would detach the gradient.

    @staticmethod
    def forward(ctx: Any, x: AsyncCollectiveTensor) -> Tensor:
        waited: Tensor = x.wait()
        return waited.view_as(waited)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Scaled(torch.autograd.Function):
    """The identity; backward scales the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Summed(torch.autograd.Function):
    """The identity; backward sums the gradient over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.group_name), None
