"""Boxes: n-dimensional slices of a tensor, and how they overlap.

A box is an offset and a length in each dimension, like torch DCP's `ChunkStorageMetadata`. Everything that resharding
on load has to compute is an intersection of boxes. Used by `save` (who writes what), `load` (what to read) and
`convert`.
"""

import math
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST_DIMENSIONS = 64  # torch's own limit
MOST_ELEMENTS = 1 << 58  # of any dtype, so that a size in bytes fits 64 bits
_PRIME = (1 << 127) - 1
_COMPARISONS = 100_000  # at most, to say where chunks overlap


class Box(NamedTuple):
    """A dense, axis-aligned slice of a tensor.

    Attributes:
        offsets: Start in each dimension, in elements.
        lengths: Length in each dimension, in elements.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def volume(self) -> int:
        """The number of elements."""
        return math.prod(self.lengths)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index expression that cuts this box out of a tensor."""
        return tuple(slice(at, at + length) for at, length in zip(self.offsets, self.lengths, strict=True))

    def within(self, outer: "Box") -> "Box":
        """Return the same box with its offsets relative to those of `outer`."""
        return Box(tuple(at - base for at, base in zip(self.offsets, outer.offsets, strict=True)), self.lengths)


def full_box(shape: Sequence[int]) -> Box:
    """Return the box that covers a full tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersection(one: Box, other: Box) -> Box | None:
    """Return the intersection of two boxes, or None if it is empty."""
    offsets, lengths = [], []
    for at, length, its_at, its_length in zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True):
        start, stop = max(at, its_at), min(at + length, its_at + its_length)
        if start >= stop:
            return None
        offsets.append(start)
        lengths.append(stop - start)
    return Box(tuple(offsets), tuple(lengths))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut a contiguous range of elements, in row-major order, into boxes.

    Needed because a checksum piece is a range of bytes, which in general is not a box. Such a range consists of the end
    of one row, a block of complete rows and the beginning of another row, and the two ends recurse into the row's own
    dimensions.

    Args:
        shape: Shape of the tensor.
        start: The first element of the range.
        stop: The element after the last one.

    Yields:
        Boxes that hold the range's elements in order; at most two per dimension.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first_complete, after_complete = -(-start // row), stop // row
    if first_complete > after_complete:  # inside one row, touching neither of its ends
        yield from _in_row(shape, after_complete, start - after_complete * row, stop - after_complete * row)
        return
    if start < first_complete * row:
        yield from _in_row(shape, first_complete - 1, start - (first_complete - 1) * row, row)
    if first_complete < after_complete:
        rest = tuple(shape[1:])
        yield Box((first_complete, *(0 for _ in rest)), (after_complete - first_complete, *rest))
    yield from _in_row(shape, after_complete, 0, stop - after_complete * row)


def cover_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Check that boxes cover a tensor, each element exactly once.

    Args:
        shape: Shape of the tensor.
        boxes: The boxes that should make it up.

    Returns:
        A clause that says what is wrong, or None if they cover it exactly.
    """
    # Sizes of 0 count as 1, because torch computes strides that way.
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
    if _covers_once(shape, boxes):
        return None
    twice = _first_overlap(boxes)
    return "is covered twice by its chunks" if twice is None else f"is covered twice at {list(twice.offsets)}"


def _covers_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Return whether boxes inside a shape cover each of its elements exactly once, in linear time.

    A box is determined by its corners, with alternating signs: the boxes cover the shape once if and only if all
    corners but those of the shape cancel. The signed sum over corners is a polynomial in one variable per dimension and
    coordinate, a product of differences for each box. Two polynomials are compared at a random point, which no file
    can know: different ones agree there with a probability of less than 2^-120 (Schwartz-Zippel).
    """
    points = [defaultdict[int, int](lambda: secrets.randbelow(_PRIME)) for _ in shape]

    def value_of(box: Box) -> int:
        value = 1
        for at, length, point in zip(box.offsets, box.lengths, points, strict=True):
            if length == 0:
                return 0
            value = value * (point[at + length] - point[at]) % _PRIME
        return value

    return sum(value_of(box) for box in boxes) % _PRIME == value_of(full_box(shape))


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.lengths))


def _first_overlap(boxes: Sequence[Box]) -> Box | None:
    """Return the intersection of two boxes that overlap, or None if it is not found with a limited effort.

    The boxes are swept along the dimension with the most distinct offsets, and each is compared only with those that
    are still open at its own offset.
    """
    boxes = [box for box in boxes if box.volume]
    if len(boxes) < 2 or not boxes[0].offsets:
        return boxes[0] if len(boxes) > 1 else None
    axis = max(range(len(boxes[0].offsets)), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    still_open: list[Box] = []
    compared = 0
    for box in sorted(boxes, key=lambda box: box.offsets[axis]):
        still_open = [other for other in still_open if other.offsets[axis] + other.lengths[axis] > box.offsets[axis]]
        compared += len(still_open)
        if compared > _COMPARISONS:
            return None
        for other in still_open:
            shared = intersection(box, other)
            if shared is not None:
                return shared
        still_open.append(box)
    return None
