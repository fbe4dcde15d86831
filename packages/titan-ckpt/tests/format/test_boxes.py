import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_ckpt.format.boxes import Box, boxes_of_range, cover_problem, full_box, intersection

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def shape_and_box(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], Box]:
    shape = draw(SHAPES) if shape is None else shape
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    lengths = tuple(draw(st.integers(1, size - at)) for at, size in zip(offsets, shape, strict=True))
    return shape, Box(offsets, lengths)


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape, one = draw(shape_and_box())
    return shape, one, draw(shape_and_box(shape))[1]


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that cover it once: it is cut in two again and again."""
    shape = draw(SHAPES)
    boxes = [full_box(shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.lengths[dim]))
        first, second = list(box.lengths), list(box.lengths)
        first[dim], second[dim] = at, box.lengths[dim] - at
        moved = list(box.offsets)
        moved[dim] += at
        boxes += [Box(box.offsets, tuple(first)), Box(tuple(moved), tuple(second))]
    return shape, draw(st.permutations(boxes))


def marked(shape: tuple[int, ...], box: Box) -> torch.Tensor:
    field = torch.zeros(shape, dtype=torch.bool)
    field[box.slices] = True
    return field


@given(two_boxes())
@settings(deadline=None)
def test_an_intersection_is_what_both_hold(case: tuple[tuple[int, ...], Box, Box]) -> None:
    shape, one, other = case
    both = marked(shape, one) & marked(shape, other)
    shared = intersection(one, other)
    assert (shared is None) == (not both.any())
    if shared is not None:
        assert torch.equal(marked(shape, shared), both)
        inside = shared.within(one)
        assert torch.equal(both[one.slices][inside.slices], both[shared.slices])


@given(SHAPES, st.data())
@settings(deadline=None)
def test_the_boxes_of_a_run_hold_its_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    volume = math.prod(shape)
    start = data.draw(st.integers(0, volume))
    stop = data.draw(st.integers(start, volume))
    elements = torch.arange(volume).reshape(shape)
    boxes = list(boxes_of_range(shape, start, stop))
    assert [n for box in boxes for n in elements[box.slices].reshape(-1).tolist()] == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape))


@given(cut_up())
@settings(deadline=None)
def test_what_covers_once_has_no_flaw(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    assert cover_problem(shape, boxes) is None


@given(cut_up(), st.data())
@settings(deadline=None)
def test_what_does_not_cover_once_is_reported(case: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    place = data.draw(st.integers(0, len(boxes) - 1))
    other = data.draw(shape_and_box(shape))[1]
    changed = [*boxes[:place], other, *boxes[place + 1 :]]
    times = sum((marked(shape, box).int() for box in changed), torch.zeros(shape, dtype=torch.int32))
    assert (cover_problem(shape, changed) is None) == bool((times == 1).all())


def test_flaws_are_named() -> None:
    assert cover_problem((4,), [Box((0,), (3,))]) == "is not covered by its chunks: they hold 3 of 4 elements"
    assert cover_problem((4,), [Box((0,), (3,)), Box((2,), (2,))]) == "is covered twice at [2]"
    assert cover_problem((), [Box((), ()), Box((), ())]) == "is covered twice at []"
    assert "outside of its shape" in str(cover_problem((4,), [Box((2,), (3,))]))
    assert "2 dimensions" in str(cover_problem((4,), [Box((0, 0), (2, 2))]))
    # As many elements as there should be, yet one twice and one never.
    assert cover_problem((4,), [Box((0,), (2,)), Box((1,), (2,))]) == "is covered twice at [1]"


def staggered(count: int) -> tuple[tuple[int, int], list[Box]]:
    """Columns that are cut one row lower each: a sweep along either dimension never closes most of them."""
    upper = [Box((0, at), (at, 1)) for at in range(1, count)]
    return (count, count), upper + [Box((at, at), (count - at, 1)) for at in range(count)]


def test_the_check_is_not_quadratic_in_the_number_of_boxes() -> None:
    """24,000 boxes, a second or two; comparing those that are open takes minutes."""
    shape, boxes = staggered(12_000)
    assert cover_problem(shape, boxes) is None
    moved = Box((5, 3), boxes[-1].lengths)  # over another one; its own place is left out
    assert cover_problem(shape, [*boxes[:-1], moved]) in (
        "is covered twice at [5, 3]",
        "is covered twice by its chunks",
    )
    assert "is covered twice" in str(cover_problem(shape, [*boxes, boxes[0]]))


def test_boxes_of_many_dimensions() -> None:
    """The corners of such a box are too many to be counted."""
    shape = (2,) * 40
    halves = [Box((0,) * 40, (1, *shape[1:])), Box((1, *(0,) * 39), (1, *shape[1:]))]
    assert cover_problem(shape, halves) is None
    assert "is covered twice" in str(cover_problem(shape, [halves[0], halves[0]]))
