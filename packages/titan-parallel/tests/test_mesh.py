"""Degrees either multiply to the world size or raise an error with numbers that work."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_parallel import MESH_DIMS, Degrees, LayoutError, check_plan

DEGREE = st.integers(1, 9)
CHOSEN = st.fixed_dictionaries(
    {name: st.one_of(st.just(-1), DEGREE) if name == "dp_shard" else DEGREE for name in MESH_DIMS}
)


@given(CHOSEN, st.integers(1, 512))
def test_resolve_or_say_what_works(chosen: dict[str, int], world: int) -> None:
    try:
        full = Degrees(**chosen).resolve(world)
    except LayoutError as error:
        said = str(error).partition("this would work: ")[2].split("; or ")
        assert 1 <= len(said) <= 3
        for layout in said:
            offered = {name: int(degree) for name, degree in (part.split() for part in layout.split(", "))}
            assert Degrees(**offered).resolve(world).dp_shard == offered["dp_shard"]
    else:
        assert math.prod(getattr(full, name) for name in MESH_DIMS) == world
        assert {**chosen, "dp_shard": full.dp_shard} == {name: getattr(full, name) for name in MESH_DIMS}
        assert chosen["dp_shard"] in (-1, full.dp_shard)


@given(st.sampled_from(MESH_DIMS), st.integers(-3, 0))
def test_no_degree_below_one(name: str, degree: int) -> None:
    if (name, degree) != ("dp_shard", -1):
        with pytest.raises(LayoutError, match=f"{name} is {degree}"):
            Degrees(**{name: degree}).resolve(4)


def test_message_names_the_numbers() -> None:
    with pytest.raises(LayoutError, match=r"dp_shard 3 x tp 2 = 6, which is not .* processes, 4; .* tp 2, dp_shard 2"):
        Degrees(dp_shard=3, tp=2).resolve(4)
    with pytest.raises(LayoutError, match=r"tp 3 = 3, which does not divide .* 4; .* tp 2"):
        Degrees(tp=3).resolve(4)
    with pytest.raises(LayoutError, match=r"pp 3 x cp 2 = 6, which .* 16; this would work: pp 4, cp 2, dp_shard 2"):
        Degrees(pp=3, cp=2).resolve(16)


def test_sequence_must_divide_too() -> None:
    with pytest.raises(LayoutError, match=r"sequence length \(sequence parallel\) 30; these degrees would: \[1, 2\]"):
        check_plan({"tensor": {"a": "colwise"}, "divisible": {"heads": 8}}, Degrees(tp=4), sequence_length=30)
