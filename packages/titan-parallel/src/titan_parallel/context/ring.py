"""Ring attention: keys and values travel from rank to rank, and no rank ever holds more than two parts of them.

(Liu et al. 2023, arXiv:2310.01889, with the balanced cut of a causal sequence.) In backward they travel once more;
their gradients travel one step behind, each rank adding its own, and after the last step arrive at their owner.

`attention` calls `ring_attention`; the work on the keys and values at hand is done by `blockwise`.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads, `S` tokens of this rank, `Dh` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titan_parallel.context.blockwise import add_attention, add_gradients, no_logs, pieces, wide
from titan_parallel.context.collectives import Passing, peers_of_name
from titan_parallel.context.layout import spans_of


@torch.library.custom_op("titan_parallel::context_ring", mutates_args=())
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, group: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally from this rank's part of each sequence, an early and a late chunk, to the full sequence.

    Args:
        q: `[B, H, S, Dh]`.
        k: `[B, Hkv, S, Dh]`.
        v: `[B, Hkv, S, Dh]`.
        starts: Integers `[B, S]`: for each query, the position in the full sequence at which its document begins; None
            for one document per sequence.
        group: Name of the process group of the ranks that share each sequence.
        scale: Factor of the scores.

    Returns:
        `[B, H, S, Dh]`, and the logs `[B, H, S]`.
    """
    _, rank, size = peers_of_name(group)
    out, logs = wide(q), no_logs(q)
    length = q.shape[2]
    queries = spans_of(rank, size, length, balanced=True)
    held = torch.stack([k, v])
    for step in range(size):
        passing = Passing(held, group) if step < size - 1 else None
        keys = spans_of((rank - step) % size, size, length, balanced=True)
        add_attention(pieces(queries, keys, starts), (q, held[0], held[1]), scale, (out, logs))
        if passing is not None:
            held = passing.wait()
    return out.to(q.dtype), logs


@torch.library.custom_op("titan_parallel::context_ring_backward", mutates_args=())
def _ring_backward(
    grad: Tensor, inputs: Sequence[Tensor], starts: Tensor | None, result: Sequence[Tensor], group: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v (`inputs`), from that of the output; `result` is the output and its logs."""
    q, k, v = inputs
    out, logs = result
    _, rank, size = peers_of_name(group)
    dq, length = wide(q), q.shape[2]
    queries = spans_of(rank, size, length, balanced=True)
    held = torch.stack([k, v])
    own = wide(held)  # gradients of this rank's keys and values by its own queries, which do not travel
    following: Passing | None = None  # gradients of what is held next, from the ranks that held it before
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
def _backward_shapes(grad: Tensor, inputs: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group, ctx.scale = inputs
    out, logs = output
    ctx.mark_non_differentiable(logs)
    ctx.save_for_backward(*tensors, out, logs)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts, out, logs = ctx.saved_tensors
    return *_ring_backward(grad, [q, k, v], starts, [out, logs], ctx.group, ctx.scale), None, None, None


ring_attention.register_autograd(_differentiate, setup_context=_save)
