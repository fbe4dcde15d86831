"""Sharing with all ranks of a pipeline what one of them has."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves, tree_map_only

from titan_parallel.errors import LayoutError
from titan_parallel.pipeline.boundary import Like


def share(output: Any, group: ProcessGroup, rank: int, device: torch.device) -> Any:
    """Return what one rank has, any container of plain tensors that torch knows, on all ranks of a group.

    Args:
        output: What it has; ignored on the others.
        group: The ranks.
        rank: The one, within the group.
        device: Where the others want its tensors.
    """
    mine = group.rank() == rank
    described = share_object(tree_map_only(Tensor, Like.of, output) if mine else None, group, rank)
    if mine:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    else:
        tensors = []

        def make(like: Like) -> Tensor:
            tensors.append(torch.empty(like.shape, dtype=like.dtype, device=device))
            return tensors[-1]

        output = tree_map_only(Like, make, described)
    for tensor in tensors:
        dist.broadcast(tensor.contiguous() if mine else tensor, group=group, group_src=rank)
    return output


def share_object(value: Any, group: ProcessGroup, rank: int) -> Any:
    """Return what one rank has, any object without tensors or an exception, on all ranks of a group."""
    objects = [_picklable(value)]
    dist.broadcast_object_list(objects, group=group, group_src=rank)
    return objects[0] if group.rank() != rank else value


def raise_together(problem: Exception | None, group: ProcessGroup) -> None:
    """Raise what went wrong on any rank of a group on all of them; its own on a rank that has one."""
    problems: list[Exception | None] = [None] * group.size()
    dist.all_gather_object(problems, _picklable(problem), group=group)
    first = problem or next((one for one in problems if one is not None), None)
    if first is not None:
        raise first


def _picklable(value: Any) -> Any:
    """Return a value that other ranks can be sent: of an exception, if need be, its text alone."""
    if isinstance(value, Exception):
        with suppress(Exception):
            text = f"{type(value).__name__}: {value}"
            return LayoutError(str(value)) if isinstance(value, LayoutError) else RuntimeError(text)
    return value
