"""Broadcasts of outputs, objects and exceptions from one rank of a pipeline to all."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from titan_parallel._torch_compat import tree_leaves, tree_map_only
from titan_parallel.errors import LayoutError
from titan_parallel.pipeline.boundary import TensorMeta


def broadcast_output(output: Any, group: ProcessGroup, rank: int, device: torch.device) -> Any:
    """Return the output of one rank, any pytree of regular tensors, on all ranks of a group.

    Args:
        output: The output; ignored on the other ranks.
        group: The ranks.
        rank: The rank within the group that has the output.
        device: Where the other ranks allocate its tensors.
    """
    mine = group.rank() == rank
    described = broadcast_object(tree_map_only(Tensor, TensorMeta.of, output) if mine else None, group, rank)
    if mine:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    else:
        tensors = []

        def make(meta: TensorMeta) -> Tensor:
            tensors.append(torch.empty(meta.shape, dtype=meta.dtype, device=device))
            return tensors[-1]

        output = tree_map_only(TensorMeta, make, described)
    for tensor in tensors:
        dist.broadcast(tensor.contiguous() if mine else tensor, group=group, group_src=rank)
    return output


def broadcast_object(value: Any, group: ProcessGroup, rank: int) -> Any:
    """Return an object of one rank (without tensors) or its exception on all ranks of a group."""
    objects = [_picklable(value)]
    dist.broadcast_object_list(objects, group=group, group_src=rank)
    return objects[0] if group.rank() != rank else value


def _picklable(value: Any) -> Any:
    """Return a value that can be sent to other ranks: of an exception only its text, since it may not be picklable."""
    if isinstance(value, Exception):
        with suppress(Exception):
            text = f"{type(value).__name__}: {value}"
            return LayoutError(str(value)) if isinstance(value, LayoutError) else RuntimeError(text)
    return value
