"""Degrees either multiply to the world size or are refused with numbers that work."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_parallel import Degrees, LayoutError, check_plan

degree = st.integers(-1, 9)


@given(degree, degree, degree, st.integers(1, 64))
def test_resolve_or_say_what_works(dp_replicate: int, dp_shard: int, tp: int, world: int) -> None:
    degrees = Degrees(dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp)
    try:
        full = degrees.resolve(world)
    except LayoutError as error:
        near = re.search(r"this would work: dp_replicate (\d+), dp_shard (\d+), tp (\d+)$", str(error))
        if near:
            replicate, shard, tensor = map(int, near.groups())
            Degrees(dp_replicate=replicate, dp_shard=shard, tp=tensor).resolve(world)
        else:
            assert min(dp_replicate, tp) < 1 or dp_shard < -1 or dp_shard == 0
    else:
        assert full.dp_replicate * full.dp_shard * full.tp == world
        assert (full.dp_replicate, full.tp) == (dp_replicate, tp)
        assert dp_shard in (-1, full.dp_shard)


def test_message_names_the_numbers() -> None:
    with pytest.raises(LayoutError, match=r"dp_replicate 1 x dp_shard 3 x tp 2 = 6, which is not .* processes, 4"):
        Degrees(dp_shard=3, tp=2).resolve(4)
    with pytest.raises(LayoutError, match=r"dp_replicate 1 x tp 3 = 3, which does not divide .* 4; .* tp 2"):
        Degrees(tp=3).resolve(4)


def test_sequence_must_divide_too() -> None:
    with pytest.raises(LayoutError, match=r"sequence length \(sequence parallel\) 30; these degrees would: \[1, 2\]"):
        check_plan({"tensor": {"a": "colwise"}, "divisible": {"heads": 8}}, tp=4, sequence_length=30)
