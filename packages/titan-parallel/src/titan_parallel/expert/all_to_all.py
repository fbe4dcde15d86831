"""The all-to-alls of rows between ranks that hold different experts.

`experts` puts `with_exchange` around the forward of each module of experts.

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

from titan_parallel._torch_compat import all_to_all_rows


def with_exchange(
    experts: Callable[[Tensor, Tensor], Tensor], x: Tensor, counts: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Send each row to the rank that holds its expert, run the experts there, and send the results back.

    Ranks first exchange how many rows they will send (`E` integers). Then there are two all-to-alls in forward and two
    in backward, of N rows each. No row is dropped, whatever the load.

    Args:
        experts: The experts of this rank, called as `experts(rows, counts)` with rows `[M, D]`, sorted by expert and
            within an expert by source rank, and integers `[E / ep]`. Where no row arrives it is called with one row of
            zeros, so that its weights always get a gradient.
        x: `[N, D]`, sorted by expert. N may be 0.
        counts: Integers `[E]`: rows for each expert.
        group: The ranks that share the experts.

    Returns:
        `[N, D]`, in the order of `x`.
    """
    ranks = dist.get_world_size(group)
    sent = counts.view(ranks, -1)  # [ep, E / ep], by destination
    received = all_to_all_rows(sent, [1] * ranks, [1] * ranks, group.group_name)  # by source
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
    """Return the order that sorts rows by expert; `received` `[ep, E / ep]` counts them by source and expert."""
    ranks, n_experts = received.shape
    expert = torch.arange(n_experts, device=received.device).repeat(ranks)
    return expert.repeat_interleave(received.flatten(), output_size=total).argsort(stable=True)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; backward sends the gradients in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: list[int], of: list[int], group_name: str) -> Tensor:
        ctx.sizes = to, of, group_name
        return all_to_all_rows(x, of, to, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to, of, group_name = ctx.sizes
        return all_to_all_rows(grad, to, of, group_name), None, None, None


class _Reorder(torch.autograd.Function):
    """Reorder rows; backward is a gather too, where torch's own indexing would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None
