"""Boxes: which part of a tensor a chunk is, and how parts overlap.

A box of an n-dimensional tensor is its offset and its length in each dimension. Everything a resharding load has to
compute is an intersection of boxes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST_DIMENSIONS = 64  # torch has no tensors of more
MOST_ELEMENTS = 1 << 58  # of any type, in bytes that 64 bits can count


class Box(NamedTuple):
    """A dense, axis-aligned part of a tensor.

    Attributes:
        offsets: where it begins, in elements, one per dimension.
        lengths: how far it reaches, in elements, one per dimension.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def volume(self) -> int:
        """The number of its elements."""
        return math.prod(self.lengths)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What to index a tensor with to get this part."""
        return tuple(slice(at, at + length) for at, length in zip(self.offsets, self.lengths, strict=True))

    def within(self, outer: "Box") -> "Box":
        """Return the same box with its offsets counted from those of `outer`."""
        return Box(tuple(at - base for at, base in zip(self.offsets, outer.offsets, strict=True)), self.lengths)


def whole(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersection(one: Box, other: Box) -> Box | None:
    """Return the part that two boxes share, or None when they share no element."""
    offsets, lengths = [], []
    for at, length, its_at, its_length in zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True):
        start, stop = max(at, its_at), min(at + length, its_at + its_length)
        if start >= stop:
            return None
        offsets.append(start)
        lengths.append(stop - start)
    return Box(tuple(offsets), tuple(lengths))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut a run of elements, in row-major order, into boxes.

    Args:
        shape: the tensor's.
        start: the first element of the run.
        stop: the element after the last one.

    Yields:
        Boxes that hold the run's elements one after the other; at most two per dimension.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first_whole, after_whole = -(-start // row), stop // row
    if first_whole > after_whole:  # within one row, of which it has neither end
        yield from _in_row(shape, after_whole, start - after_whole * row, stop - after_whole * row)
        return
    if start < first_whole * row:
        yield from _in_row(shape, first_whole - 1, start - (first_whole - 1) * row, row)
    if first_whole < after_whole:
        rest = tuple(shape[1:])
        yield Box((first_whole, *(0 for _ in rest)), (after_whole - first_whole, *rest))
    yield from _in_row(shape, after_whole, 0, stop - after_whole * row)


def flaw_in_cover(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Tell what is wrong with boxes that should cover a tensor, each element once.

    Args:
        shape: the tensor's.
        boxes: the parts it is said to consist of.

    Returns:
        A clause that says what is wrong, or None when they cover it exactly.
    """
    # Sizes of 0 count as 1, for torch reckons strides with them.
    if len(shape) > MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        return f"has the impossible shape {str(list(shape))[:80]}"
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.lengths) != len(shape):
            return f"has a chunk of {len(box.lengths)} dimensions where the tensor has {len(shape)}"
        if any(at < 0 or n < 0 or at + n > size for at, n, size in zip(*box, shape, strict=True)):
            return f"has a chunk at {list(box.offsets)} of {list(box.lengths)}, outside of its shape {list(shape)}"
    covered, volume = sum(box.volume for box in boxes), math.prod(shape)
    if covered < volume:
        return f"is not covered by its chunks: they hold {covered} of {volume} elements"
    twice = _first_overlap(boxes)
    if covered > volume or twice is not None:
        return f"is covered twice at {list(twice.offsets)}" if twice else "has more chunks than elements"
    return None


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.lengths))


def _first_overlap(boxes: Sequence[Box]) -> Box | None:
    """Sweep along the dimension with the most distinct offsets: each box meets only those it lies beside."""
    boxes = [box for box in boxes if box.volume]
    if len(boxes) < 2 or not boxes[0].offsets:
        return boxes[0] if len(boxes) > 1 else None
    axis = max(range(len(boxes[0].offsets)), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[axis]):
        beside = [other for other in beside if other.offsets[axis] + other.lengths[axis] > box.offsets[axis]]
        for other in beside:
            shared = intersection(box, other)
            if shared is not None:
                return shared
        beside.append(box)
    return None
