"""Gradient norm and clipping over parameters of any sharding.

`ParallelModel.clip_grad_norm` calls it for the parameters of a rank; it works without a `ParallelModel` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_parallel._torch_compat import multiply_all, norms_of_all
from titan_parallel.tensor.styles import settle_gradients


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    *,
    stages: dist.ProcessGroup | None = None,
    copies: Iterable[nn.Parameter] = (),
    device: torch.device | str | None = None,
) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`.

    Parameters are grouped by the mesh dims that they are sharded over, and the squares of each group are summed over
    these dims. No gradient is gathered.

    Args:
        parameters: All parameters of this rank; those without a gradient are skipped.
        max_norm: The bound; None only measures the norm.
        stages: The ranks of a pipeline, each with its own parameters; None without a pipeline.
        copies: Those of `parameters` that another rank of `stages` counts. They are scaled with the others.
        device: Where to compute the norm. Default: where ranks communicate, which with `cpu_offload` is not where the
            gradients are.

    Returns:
        The norm before clipping, a regular fp32 scalar, equal on all ranks; not finite if any gradient is not.
    """
    parameters = list(parameters)
    settle_gradients(parameters)
    groups: dict[tuple[DeviceMesh, tuple[bool, ...]] | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            groups.setdefault(_sharding(gradient), []).append(parameter)
    uncounted = {id(parameter) for parameter in copies}
    if device is None:
        device = _device(parameters)
    squares = [torch.zeros((), device=device)]
    for group in groups.values():
        gradients = [p.grad for p in group if p.grad is not None and id(p) not in uncounted]
        if gradients:
            squares.append(_sum_of_squares(gradients).to(device))
    square = torch.stack(squares).sum()
    if stages is not None:
        dist.all_reduce(square, group=stages)
    total: Tensor = square.sqrt()
    if max_norm is not None:
        _scale([p.grad for p in parameters if p.grad is not None], (max_norm / (total + 1e-6)).clamp(max=1))
    return total


def _device(parameters: Sequence[nn.Parameter]) -> torch.device | str | None:
    """Return the device on which the ranks that share these parameters communicate."""
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            return parameter.device_mesh.device_type
    return parameters[0].device if parameters else None


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply each rank's local shards: DTensor's own operator would compute the sharding of every gradient first."""
    devices: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        devices.setdefault(local.device, []).append(local)
    for device, shards in devices.items():
        multiply_all(shards, factor.to(device))


def _sharding(gradient: Tensor) -> tuple[DeviceMesh, tuple[bool, ...]] | None:
    if not isinstance(gradient, DTensor):
        return None
    return gradient.device_mesh, tuple(not placement.is_replicate() for placement in gradient.placements)


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Return the sum over all ranks for gradients of one group, in fp32 so that layouts round alike."""
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    total: Tensor = torch.stack(norms_of_all(local)).square().sum()
    sharding = _sharding(gradients[0])
    if sharding is None:
        return total
    mesh, sharded = sharding
    total = total.to(mesh.device_type)  # gradients may be offloaded, but ranks communicate between devices
    # torch 2.11 cannot sum a DTensor over the three dims that experts may be sharded over, so dim by dim.
    for dim, is_sharded in enumerate(sharded):
        if is_sharded and mesh.size(dim) > 1:
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total
