"""Communication between the ranks that share a sequence, as custom operators that torch.compile does not trace into.

Called by `attention`, `ring` and `inputs`. The gradient of each operator is its counterpart. All of them wait: nothing
is in flight when they return. They take the name of a process group, since operators cannot take the group itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, Work

from titan_parallel._torch_compat import group_of_name
from titan_parallel.context.layout import by_rank, in_order, is_balanced


class Peers(NamedTuple):
    """The ranks that share a sequence.

    Attributes:
        group: Name of their process group.
        rank: This rank's index in the group.
        size: Number of ranks.
    """

    group: str
    rank: int
    size: int


def peers_of(group: ProcessGroup) -> Peers:
    """Return the ranks of a process group."""
    return Peers(group.group_name, group.rank(), group.size())


def peers_of_name(name: str) -> Peers:
    """Return the ranks of a process group, by the group's name."""
    return peers_of(group_of_name(name))


@torch.library.custom_op("titan_parallel::context_gather", mutates_args=())
def gather_sequence(x: Tensor, dim: int, group: str, size: int, kind: str) -> Tensor:
    """Return full sequences, in order, from the parts of all ranks.

    Args:
        x: This rank's part.
        dim: The dim of the sequence, not negative.
        group: Name of the process group.
        size: Number of its ranks.
        kind: A `ContextKind`, which determines how sequences were cut.
    """
    parts = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=group_of_name(group))
    return in_order(parts.view(size, *x.shape), dim, balanced=is_balanced(kind))


@torch.library.custom_op("titan_parallel::context_scatter", mutates_args=())
def scatter_sequence(x: Tensor, dim: int, group: str, size: int, kind: str) -> Tensor:
    """Return this rank's part of the sum of all ranks' `x`; arguments are those of `gather_sequence`."""
    parts = by_rank(x, dim, size, balanced=is_balanced(kind))
    out = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=group_of_name(group))
    return out


@torch.library.custom_op("titan_parallel::context_all_to_all", mutates_args=())
def all_to_all(x: Tensor, group: str) -> Tensor:
    """Send entry `i` of dim 0 to rank `i`; return the entries received, in the order of ranks."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group_of_name(group))
    return out


@gather_sequence.register_fake
def _gathered_shape(x: Tensor, dim: int, group: str, size: int, kind: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= size
    return x.new_empty(shape)


@scatter_sequence.register_fake
def _scattered_shape(x: Tensor, dim: int, group: str, size: int, kind: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= size
    return x.new_empty(shape)


@all_to_all.register_fake
def _exchanged_shape(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_how(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.how = inputs


def _scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return scatter_sequence(grad, *ctx.how), None, None, None, None


def _exchange_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return all_to_all(grad, *ctx.how), None


gather_sequence.register_autograd(_scatter_gradient, setup_context=_keep_how)
all_to_all.register_autograd(_exchange_gradient, setup_context=_keep_how)


class Passing:
    """A transfer around the ring: tensors to the next rank, and tensors of the same shapes from the previous one."""

    def __init__(self, x: Tensor, group: str) -> None:
        process_group = group_of_name(group)
        rank, size = process_group.rank(), process_group.size()
        self._sent = x  # has to stay alive until it is sent
        self._received = torch.empty_like(x)
        steps = [
            P2POp(dist.isend, x, group=process_group, group_peer=(rank + 1) % size),
            P2POp(dist.irecv, self._received, group=process_group, group_peer=(rank - 1) % size),
        ]
        self._works: list[Work] = dist.batch_isend_irecv(steps)

    def wait(self) -> Tensor:
        """Return the received tensors."""
        for work in self._works:
            work.wait()
        return self._received
