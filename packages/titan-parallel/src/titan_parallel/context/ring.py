"""Ring attention: keys and values go from rank to rank, and no rank ever holds more than two parts of them.

(Liu et al. 2023, arXiv:2310.01889, with the balanced cut of a causal sequence.) Backward sends them around once more;
their gradients follow one step behind, each rank adding its own, and come home at last.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads, `S` tokens of this rank, `Dh` head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_parallel.context.blockwise import add_attention, add_gradients, no_logs, pieces, wide
from titan_parallel.context.collectives import Passing
from titan_parallel.context.layout import spans_of


@torch.library.custom_op("titan_parallel::context_ring", mutates_args=())
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, group: str, rank: int, size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally from this rank's part of each sequence, an early and a late chunk, to the whole of it.

    Args:
        q: `[B, H, S, Dh]`.
        k: `[B, Hkv, S, Dh]`.
        v: `[B, Hkv, S, Dh]`.
        starts: Integers `[B, S]`: for each query, the place in the whole sequence at which its document begins; None
            for one document a row.
        group: Name of the process group.
        rank: This one's place in it.
        size: Number of its ranks.
        scale: Of the scores.

    Returns:
        `[B, H, S, Dh]`, and the logs `[B, H, S]`.
    """
    out, logs = wide(q), no_logs(q)
    length = q.shape[2]
    queries = spans_of(rank, size, length, balanced=True)
    held = torch.stack([k, v])
    for step in range(size):
        passing = Passing(held, group) if step < size - 1 else None
        keys = spans_of((rank - step) % size, size, length, balanced=True)
        add_attention(pieces(queries, keys, starts), q, held[0], held[1], scale, out, logs)
        if passing is not None:
            held = passing.wait()
    return out.to(q.dtype), logs


@torch.library.custom_op("titan_parallel::context_ring_backward", mutates_args=())
def _ring_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    out: Tensor,
    logs: Tensor,
    group: str,
    rank: int,
    size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, length = wide(q), q.shape[2]
    queries = spans_of(rank, size, length, balanced=True)
    held = torch.stack([k, v])
    own = wide(held)  # gradients of this rank's keys and values by its own queries, which need not travel
    following: Passing | None = None  # gradients of what is held next, by the ranks that had it before
    for step in range(size):
        passing = Passing(held, group) if step < size - 1 else None
        keys = spans_of((rank - step) % size, size, length, balanced=True)
        added = own if step == 0 else wide(held)
        add_gradients(
            pieces(queries, keys, starts), grad, (q, held[0], held[1]), scale, (out, logs), (dq, added[0], added[1])
        )
        if following is not None:
            added += following.wait()
        if step > 0:
            following = Passing(added.to(k.dtype), group)
        if passing is not None:
            held = passing.wait()
    if following is not None:
        own += following.wait()
    dk, dv = own.to(k.dtype)
    return dq.to(q.dtype), dk.clone(), dv.clone()


@ring_attention.register_fake
def _shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), no_logs(q)


@_ring_backward.register_fake
def _backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group, ctx.rank, ctx.size, ctx.scale = inputs
    out, logs = output
    ctx.mark_non_differentiable(logs)
    ctx.save_for_backward(*tensors, out, logs)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    how = ctx.group, ctx.rank, ctx.size, ctx.scale
    dq, dk, dv = _ring_backward(grad, *ctx.saved_tensors, *how)
    return dq, dk, dv, *[None] * 5


ring_attention.register_autograd(_differentiate, setup_context=_save)
