"""The exchange of rows between ranks that hold different experts.

Shapes: `N` rows of this rank, `M` rows that its experts get from all ranks, `D` model dim, `E` experts, `ep` ranks that
share them. Rank `r` holds the experts from `r * E / ep` on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def with_exchange(
    experts: Callable[[Tensor, Tensor], Tensor], x: Tensor, counts: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Have each row transformed by its expert, on the rank that holds it.

    Ranks tell one another how many rows they will send (`E` integers), then send the rows, and later the results the
    way back: two all-to-alls in forward, two in backward, of N rows each. No row is dropped, whatever the load.

    Args:
        experts: The experts of this rank: called as `experts(rows, counts)` with rows `[M, D]`, sorted by expert and
            within an expert by the rank that they come from, and integers `[E / ep]`. It is never called without any
            row, so that its weights always have a gradient: with one of zeros, if need be.
        x: `[N, D]`, sorted by expert. N may be 0.
        counts: Integers `[E]`: rows of each expert.
        group: The ranks that share the experts.

    Returns:
        `[N, D]`, row by row.
    """
    ranks = dist.get_world_size(group)
    sent = counts.view(ranks, -1)  # [ep, E / ep], by destination
    received = _all_to_all(sent, [1] * ranks, [1] * ranks, group.group_name)  # by source
    to, of = torch.stack((sent.sum(1), received.sum(1))).tolist()
    order = _by_expert(received, sum(of))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # its inverse
    own = received.sum(0)

    rows = _Reorder.apply(_Exchange.apply(x, to, of, group.group_name), order, place)  # [M, D]
    if sum(of):
        out = experts(rows, own)
    else:
        own[0] = 1
        out = experts(F.pad(rows, (0, 0, 0, 1)), own)[:0]
    back: Tensor = _Exchange.apply(_Reorder.apply(out, place, order), of, to, group.group_name)
    return back


def _by_expert(received: Tensor, total: int) -> Tensor:
    """Return the order that sorts rows by expert; `received` `[ep, E / ep]` come from each rank for each of them."""
    ranks, n_experts = received.shape
    expert = torch.arange(n_experts, device=received.device).repeat(ranks)
    return expert.repeat_interleave(received.flatten(), output_size=total).argsort(stable=True)


def _all_to_all(x: Tensor, to: list[int], of: list[int], group_name: str) -> Tensor:
    """Send `to[r]` rows of `x` to each rank `r`, and return the `of[r]` rows that each sent here."""
    # The functional operator, unlike the one that writes into a given tensor, is one that checkpointing can save.
    ops: Any = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_to_all_single(x.contiguous(), of, to, group_name))
    return out


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows; the backward sends gradients the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: list[int], of: list[int], group_name: str) -> Tensor:
        ctx.way = to, of, group_name
        return _all_to_all(x, to, of, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to, of, group_name = ctx.way
        return _all_to_all(grad, of, to, group_name), None, None, None


class _Reorder(torch.autograd.Function):
    """Puts rows into another order; both ways are a gather, where torch would scatter on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None
