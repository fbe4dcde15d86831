"""Attention from parts of a sequence to parts of it, as unmasked rectangles and causal squares ("pieces").

A document is a run of consecutive tokens. So the keys that a chunk of queries may attend to are, for each document in
the chunk, a causal square of the document itself and, for the first document, which may have begun before the chunk, a
rectangle of all its earlier keys. No tensor of the size of a mask is created, and scores that would be masked are not
computed.

Called by `attention` (`attend`, for `allgather` and `ulysses`) and by `ring`; `kernels` computes each piece.

Logs: the log of each softmax's denominator, by which results over different keys are merged.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads, `S` queries, `T` keys, `Dh` head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_parallel.context.kernels import Inputs, Result, kernel_for, merge
from titan_parallel.context.layout import Span


class Piece(NamedTuple):
    """Queries that attend to keys: to all of them or, if `causal`, to those up to their own position.

    Attributes:
        sequences: Which sequences of the batch.
        queries: Which of the queries at hand.
        keys: Which of the keys at hand.
        causal: Whether queries and keys are the same tokens, masked causally.
    """

    sequences: slice
    queries: slice
    keys: slice
    causal: bool


def document_starts(document_ids: Tensor) -> Tensor:
    """Return the position at which the document (run of equal ids) of each token of full sequences `[B, S]` begins."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    return (places * begins).cummax(1).values


def pieces(queries: Sequence[Span], keys: Sequence[Span], starts: Tensor | None) -> Iterator[Piece]:
    """Yield the pieces that cover every pair of a query and a key that it attends to, each pair once.

    Each span of queries is compared with each span of keys. Keys before the first query of the span form the
    rectangle, limited to the first document; keys that are queries themselves form one causal square per document.

    Args:
        queries: Spans of the queries.
        keys: Spans of the keys; each contains a span of queries entirely or not at all.
        starts: Integers `[B, S]`: for each query, the position at which its document begins; None for one document per
            sequence.
    """
    cuts = None if starts is None else [_cuts(starts, span) for span in queries]
    for i, query in enumerate(queries):
        for key in keys:
            if query.place < key.place:
                continue
            if cuts is None:
                yield from _sequence_pieces(slice(None), query, key, key.place, [0, query.length])
                continue
            for row, (first, ends) in enumerate(cuts[i]):
                yield from _sequence_pieces(slice(row, row + 1), query, key, max(first, key.place), ends)


def _sequence_pieces(sequences: slice, query: Span, key: Span, first: int, ends: list[int]) -> Iterator[Piece]:
    """Yield the pieces of one span of queries, whose documents end at `ends`; the first document began at `first`."""
    before = min(key.length, query.place - key.place)  # number of keys before the first query
    if first < key.place + before:
        seen = slice(key.local + first - key.place, key.local + before)
        yield Piece(sequences, slice(query.local, query.local + ends[1]), seen, causal=False)
    if before < key.length:
        for begin, end in pairwise(ends):
            own = slice(query.local + begin, query.local + end)
            yield Piece(sequences, own, slice(key.local + before + begin, key.local + before + end), causal=True)


def _cuts(starts: Tensor, span: Span) -> list[tuple[int, list[int]]]:
    """Return for each sequence where the span's first document begins, and the bounds of documents within the span."""
    own = starts[:, span.local : span.local + span.length]
    begins = own == torch.arange(span.place, span.place + span.length, device=own.device)
    begins[:, 0] = True
    ends: list[list[int]] = [[] for _ in own]
    for row, column in begins.nonzero().tolist():
        ends[row].append(column)
    return [(first, [*row, span.length]) for first, row in zip(own[:, 0].tolist(), ends, strict=True)]


def add_attention(some: Iterable[Piece], inputs: Inputs, scale: float, result: Result) -> None:
    """Merge the attention of pieces into `result`.

    Args:
        some: The pieces.
        inputs: q, k and v.
        scale: Factor of the scores.
        result: Output `[B, H, S, Dh]` and logs `[B, H, S]`, in fp32 or wider, changed in place.
    """
    (q, k, v), (out, logs) = inputs, result
    kernel = kernel_for(q)
    for rows, queries, keys, causal in some:
        part = kernel.forward((q[rows, :, queries], k[rows, :, keys], v[rows, :, keys]), causal=causal, scale=scale)
        merge((out[rows, :, queries], logs[rows, :, queries]), part)


def add_gradients(
    some: Iterable[Piece],
    grad: Tensor,
    inputs: Inputs,
    scale: float,
    result: Result,
    gradients: Inputs,
) -> None:
    """Add the gradients of pieces to `gradients`.

    Args:
        some: The pieces.
        grad: Gradient of the output, `[B, H, S, Dh]`.
        inputs: q, k and v.
        scale: Factor of the scores.
        result: The output and its logs, over all keys.
        gradients: Gradients of q, k and v, in fp32 or wider, changed in place.
    """
    kernel = kernel_for(inputs[0])
    for rows, queries, keys, causal in some:
        places = queries, keys, keys
        q, k, v = (x[rows, :, place] for x, place in zip(inputs, places, strict=True))
        out, logs = (x[rows, :, queries] for x in result)
        parts = kernel.backward(grad[rows, :, queries], (q, k, v), (out, logs), causal=causal, scale=scale)
        for total, place, part in zip(gradients, places, parts, strict=True):
            total[rows, :, place] += part


def wide(x: Tensor) -> Tensor:
    """Return zeros of the shape of `x`, in fp32 or wider, to accumulate in."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def no_logs(q: Tensor) -> Tensor:
    """Return the logs of attention to no keys, -inf, for queries `q`."""
    return q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("titan_parallel::context_attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, places: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally from chunks of sequences to full sequences.

    Args:
        q: `[B, H, S, Dh]`, chunks of equal length, concatenated.
        k: `[B, Hkv, T, Dh]`.
        v: `[B, Hkv, T, Dh]`.
        starts: Integers `[B, S]`: for each query, the position in `T` at which its document begins; None for one
            document per sequence.
        places: The position in `T` at which each chunk of queries begins.
        scale: Factor of the scores.

    Returns:
        `[B, H, S, Dh]`, and the logs `[B, H, S]`.
    """
    out, logs = wide(q), no_logs(q)
    add_attention(pieces(*_spans(q, k, places), starts), (q, k, v), scale, (out, logs))
    return out.to(q.dtype), logs


@torch.library.custom_op("titan_parallel::context_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    starts: Tensor | None,
    result: Sequence[Tensor],
    places: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v (`inputs`), from that of the output; `result` is the output and its logs."""
    q, k, v = inputs
    out, logs = result
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
def _attend_backward_shapes(grad: Tensor, inputs: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.places, ctx.scale = inputs
    out, logs = output
    ctx.mark_non_differentiable(logs)
    ctx.save_for_backward(*tensors, out, logs)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts, out, logs = ctx.saved_tensors
    return *_attend_backward(grad, [q, k, v], starts, [out, logs], ctx.places, ctx.scale), None, None, None


attend.register_autograd(_differentiate, setup_context=_save)
