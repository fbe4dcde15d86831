"""Which part of a sequence each rank of context parallelism has.

Under causal attention the last tokens attend to the most keys. So the sequence is cut into twice as many chunks as
there are ranks, and rank `r` of `n` has chunk `r` and chunk `2 n - 1 - r`: all ranks then have the same work
("balanced"). With `ulysses` each rank attends with full sequences, for some of the heads, and rank `r` has the `r`-th
of `n` chunks.

Used by all of `context`, and by `check_plan` for lengths and heads that do not divide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from titan_parallel.errors import LayoutError


class Span(NamedTuple):
    """Consecutive tokens.

    Attributes:
        local: Index of the first one in the tensor at hand.
        place: Its position in the full sequence.
        length: Number of tokens.
    """

    local: int
    place: int
    length: int


def is_balanced(kind: str) -> bool:
    """Return whether each rank has an early and a late chunk, rather than one; `kind` is a `ContextKind`."""
    return kind != "ulysses"


def spans_of(rank: int, size: int, length: int, *, balanced: bool) -> list[Span]:
    """Return which tokens of a sequence the `length` tokens of a rank are."""
    if not balanced:
        return [Span(0, rank * length, length)]
    half = length // 2
    return [Span(0, rank * half, half), Span(half, (2 * size - 1 - rank) * half, half)]


def take_part(x: Tensor, dim: int, rank: int, size: int, *, balanced: bool) -> Tensor:
    """Return a rank's part of a tensor with full sequences in `dim`; it may be a view."""
    spans = spans_of(rank, size, x.shape[dim] // size, balanced=balanced)
    parts = [x.narrow(dim, span.place, span.length) for span in spans]
    return torch.cat(parts, dim) if balanced else parts[0]


def in_order(parts: Tensor, dim: int, *, balanced: bool) -> Tensor:
    """Return full sequences in `dim` from the parts of all ranks, stacked in an additional first dim."""
    length = parts.shape[dim + 1]
    owned = [
        (span.place, part.narrow(dim, span.local, span.length))
        for rank, part in enumerate(parts)
        for span in spans_of(rank, len(parts), length, balanced=balanced)
    ]
    return torch.cat([chunk for _, chunk in sorted(owned, key=lambda pair: pair[0])], dim)


def by_rank(full: Tensor, dim: int, size: int, *, balanced: bool) -> Tensor:
    """Return the parts of all ranks, stacked in a new first dim: the input of `in_order`."""
    return torch.stack([take_part(full, dim, rank, size, balanced=balanced) for rank in range(size)])


def length_unit(size: int, kind: str, split_over: int = 1) -> int:
    """Return the number that sequence lengths must be a multiple of.

    Args:
        size: The context-parallel degree.
        kind: A `ContextKind`.
        split_over: Ranks over which each part is split again, by sequence parallelism.
    """
    return math.lcm(2 * size if is_balanced(kind) else size, size * split_over)


def check_length(length: int, size: int, kind: str, split_over: int = 1) -> None:
    """Check that a sequence of `length` tokens can be cut.

    Raises:
        LayoutError: If not; the message names the nearest lengths and the degrees that would fit.
    """
    unit = length_unit(size, kind, split_over)
    if length % unit == 0:
        return
    near = sorted({max(unit, length // unit * unit), (length // unit + 1) * unit})
    fits = [d for d in range(1, length + 1) if length % length_unit(d, kind, split_over) == 0]
    why = f"{2 * size} chunks, two for each rank of cp {size}" if is_balanced(kind) else f"cp {size} parts"
    more = f", each part split over tp {split_over} (sequence parallelism)" if split_over > 1 else ""
    degrees = f"these degrees of cp would divide it: {fits}" if fits else "no degree of cp would divide it"
    raise LayoutError(
        f"context parallelism ({kind}) cuts a sequence into {why}{more}: its length must be a multiple of {unit}, "
        f"which {length} is not; the nearest are {' and '.join(map(str, near))}; {degrees}"
    )


def check_heads(heads: int, size: int, tp: int) -> None:
    """Check that query heads divide over the ranks.

    Raises:
        LayoutError: If not; the message names the degrees that would fit.
    """
    if heads % (tp * size) == 0:
        return
    split = f" and tp {tp}" if tp > 1 else ""
    fits = [d for d in range(1, heads + 1) if heads % (d * tp) == 0]
    could = f"these degrees of cp would: {fits}" if fits else "no degree of cp would"
    raise LayoutError(
        f"context 'ulysses' distributes query heads over ranks, but cp {size}{split} does not divide {heads} query "
        f"heads; {could}; or set context to 'allgather' or 'ring'"
    )
