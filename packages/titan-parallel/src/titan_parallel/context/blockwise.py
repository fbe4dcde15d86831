"""Attention of parts of a sequence to parts of it, piece by piece, with no mask in any of them.

A document is a run of successive tokens. So the keys that a chunk of queries sees are, for each document in the chunk,
a square of itself, seen causally, and for the first document, which may have begun before the chunk, a rectangle of
earlier keys, seen as a whole. Nothing of the size of a mask is ever made, and what is not seen is not computed.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads, `S` queries, `T` keys, `Dh` head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_parallel.context.kernels import kernel_for, merge
from titan_parallel.context.layout import Span


class Piece(NamedTuple):
    """Queries that see keys: all of them or, if `causal`, those up to their own place."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def document_starts(document_ids: Tensor) -> Tensor:
    """Return for each token of whole sequences `[B, S]` where its document, its run of equal ids, begins in its row."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    return (places * begins).cummax(1).values


def pieces(queries: Sequence[Span], keys: Sequence[Span], starts: Tensor | None) -> Iterator[Piece]:
    """Yield which of the keys the queries see; each query and key that see one another are in one piece.

    Args:
        queries: Where the queries lie.
        keys: Where the keys lie; a span of them holds all of a span of queries, or nothing of it.
        starts: Integers `[B, S]`: for each query, the place at which its document begins; None for one a row.
    """
    cuts = None if starts is None else [_cuts(starts, span) for span in queries]
    for i, query in enumerate(queries):
        for key in keys:
            before = min(key.length, query.place - key.place)  # keys ahead of the first query
            if before < 0:
                continue
            if cuts is None:
                yield from _row_pieces(slice(None), query, key, before, key.place, [0, query.length])
                continue
            for row, (first, ends) in enumerate(cuts[i]):
                yield from _row_pieces(slice(row, row + 1), query, key, before, max(first, key.place), ends)


def _row_pieces(rows: slice, query: Span, key: Span, before: int, first: int, ends: list[int]) -> Iterator[Piece]:
    """Yield the pieces of one span of queries, whose documents end at `ends`; the first document began at `first`."""
    if first < key.place + before:
        seen = slice(key.local + first - key.place, key.local + before)
        yield Piece(rows, slice(query.local, query.local + ends[1]), seen, causal=False)
    if before < key.length:
        for begin, end in pairwise(ends):
            own = slice(query.local + begin, query.local + end)
            yield Piece(rows, own, slice(key.local + before + begin, key.local + before + end), causal=True)


def _cuts(starts: Tensor, span: Span) -> list[tuple[int, list[int]]]:
    """Return for each row where the span's first document begins, and where in the span documents begin and end."""
    own = starts[:, span.local : span.local + span.length]
    begins = own == torch.arange(span.place, span.place + span.length, device=own.device)
    begins[:, 0] = True
    ends: list[list[int]] = [[] for _ in own]
    for row, column in begins.nonzero().tolist():
        ends[row].append(column)
    return [(first, [*row, span.length]) for first, row in zip(own[:, 0].tolist(), ends, strict=True)]


def add_attention(
    some: Iterable[Piece], q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, logs: Tensor
) -> None:
    """Merge what the pieces give into `out` `[B, H, S, Dh]` and `logs` `[B, H, S]`, both in fp32 or better."""
    kernel = kernel_for(q)
    for rows, queries, keys, causal in some:
        inputs = q[rows, :, queries], k[rows, :, keys], v[rows, :, keys]
        merge(out[rows, :, queries], logs[rows, :, queries], *kernel.forward(*inputs, causal, scale))


def add_gradients(
    some: Iterable[Piece],
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
    results: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add the pieces' gradients.

    Args:
        some: The pieces.
        grad: Gradient of the output, `[B, H, S, Dh]`.
        inputs: q, k and v.
        scale: Of the scores.
        results: The output and its logs, over all keys.
        gradients: Of q, k and v, in fp32 or better, to be added to.
    """
    kernel = kernel_for(inputs[0])
    for rows, queries, keys, causal in some:
        places = queries, keys, keys
        q, k, v = (x[rows, :, place] for x, place in zip(inputs, places, strict=True))
        out, logs = (x[rows, :, queries] for x in results)
        parts = kernel.backward(grad[rows, :, queries], q, k, v, out, logs, causal, scale)
        for whole, place, part in zip(gradients, places, parts, strict=True):
            whole[rows, :, place] += part


def wide(x: Tensor) -> Tensor:
    """Return zeros as `x`, in fp32 or better, to add to."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def no_logs(q: Tensor) -> Tensor:
    """Return the logs of no keys at all, for `q`."""
    return q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("titan_parallel::context_attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, places: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally from chunks of sequences to whole sequences.

    Args:
        q: `[B, H, S, Dh]`, chunks of equal length one after the other.
        k: `[B, Hkv, T, Dh]`.
        v: `[B, Hkv, T, Dh]`.
        starts: Integers `[B, S]`: for each query, where in `T` its document begins; None for one a row.
        places: Where in `T` each chunk of queries begins.
        scale: Of the scores.

    Returns:
        `[B, H, S, Dh]`, and the logs `[B, H, S]`.
    """
    out, logs = wide(q), no_logs(q)
    add_attention(pieces(*_spans(q, k, places), starts), q, k, v, scale, out, logs)
    return out.to(q.dtype), logs


@torch.library.custom_op("titan_parallel::context_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    out: Tensor,
    logs: Tensor,
    places: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = wide(q), wide(k), wide(v)
    add_gradients(pieces(*_spans(q, k, places), starts), grad, (q, k, v), scale, (out, logs), gradients)
    dq, dk, dv = gradients
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _spans(q: Tensor, k: Tensor, places: Sequence[int]) -> tuple[list[Span], list[Span]]:
    length = q.shape[2] // len(places)
    return [Span(i * length, place, length) for i, place in enumerate(places)], [Span(0, 0, k.shape[2])]


@attend.register_fake
def _attend_shapes(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, places: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), no_logs(q)


@_attend_backward.register_fake
def _attend_backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.places, ctx.scale = inputs
    out, logs = output
    ctx.mark_non_differentiable(logs)
    ctx.save_for_backward(*tensors, out, logs)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _attend_backward(grad, *ctx.saved_tensors, ctx.places, ctx.scale)
    return dq, dk, dv, None, None, None


attend.register_autograd(_differentiate, setup_context=_save)
