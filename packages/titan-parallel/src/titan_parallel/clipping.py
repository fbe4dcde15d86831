"""Gradient norm and clipping over parameters of any sharding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_parallel.tensor_parallel import to_full


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`.

    Parameters are taken by sharding, each group's norm is reduced over its own mesh, and the groups' norms are
    combined; no gradient is gathered.

    Args:
        parameters: All parameters of this rank; those without a gradient are passed over.
        max_norm: The bound; None only measures.

    Returns:
        The norm before clipping, a plain fp32 scalar that is equal on all ranks; not finite if any gradient is not.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
            groups.setdefault(key, []).append(parameter)
    if not groups:
        return torch.zeros(())
    norms = [
        to_full(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in groups.values()
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    if max_norm is not None:
        for group in groups.values():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
