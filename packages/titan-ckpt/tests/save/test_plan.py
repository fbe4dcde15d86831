import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_ckpt import CheckpointError
from titan_ckpt.format.boxes import Box, cover_problem, full_box
from titan_ckpt.save.plan import assign_writes
from titan_ckpt.state.shards import Part, box_within_shards

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@st.composite
def held_by_ranks(draw: st.DrawFn) -> list[list[Part]]:
    """Tensors replicated on some ranks, sharded over some, owned by one, or all of it, each on its own ranks."""
    world = draw(st.integers(1, 5))
    held: list[list[Part]] = [[] for _ in range(world)]
    for number in range(draw(st.integers(0, 8))):
        rows, dtype = draw(st.integers(0, 9)), draw(DTYPES)
        left = draw(st.permutations(range(world)))
        while left:
            count = draw(st.integers(1, len(left)))
            ranks, left = left[:count], left[count:]
            sharded = draw(st.booleans()) and rows > 0
            for place, rank in enumerate(ranks):
                start, stop = rows * place // count, rows * (place + 1) // count
                box = Box((start, 0), (stop - start, 3)) if sharded else full_box((rows, 3))
                if not sharded or stop > start:
                    held[rank].append(Part(f"w{number}", dtype, (rows, 3), box, str(ranks) if sharded else ""))
            if draw(st.booleans()):
                break
    return held


@given(held_by_ranks(), st.integers(1, 200))
@settings(deadline=None)
def test_every_element_is_written_once_by_one_that_has_it(held: list[list[Part]], file_bytes: int) -> None:
    files = assign_writes(held, file_bytes)
    written: dict[str, list[Box]] = {}
    for of_rank in files:
        for part in (part for file in of_rank for part in file.parts):
            written.setdefault(part.name, []).append(part.box)
    shapes = {part.name: part.shape for parts in held for part in parts}
    assert written.keys() == shapes.keys()
    for name, boxes in written.items():
        assert cover_problem(shapes[name], boxes) is None
    for rank, of_rank in enumerate(files):
        for file in of_rank:
            assert set(file.parts) <= set(held[rank])
            assert file.parts
            assert len(file.parts) == 1 or sum(part.nbytes for part in file.parts) <= file_bytes
            sizes = [part.dtype.itemsize for part in file.parts]
            assert sizes == sorted(sizes, reverse=True)  # so that each is aligned
    names = [file.name for of_rank in files for file in of_rank]
    assert names == [f"tensors-{n:05d}-of-{len(names):05d}.safetensors" for n in range(len(names))]


def test_replicas_are_shared_out_evenly() -> None:
    parts = [Part(f"w{n}", torch.float32, (100 + n,), full_box((100 + n,))) for n in range(40)]
    loads = [sum(part.nbytes for file in files for part in file.parts) for files in assign_writes([parts] * 4, 1 << 30)]
    assert max(loads) - min(loads) < 500 * 4


def test_of_several_cuts_the_finest_is_written() -> None:
    """A tied weight that is one piece in the first pipeline stage and three in the last."""
    one = Part("tied", torch.float32, (6,), full_box((6,)))
    three = [Part("tied", torch.float32, (6,), Box((at,), (2,)), "ranks 1 to 3") for at in (0, 2, 4)]
    files = assign_writes([[one], *([part] for part in three)], 1 << 30)
    assert [[part for file in of_rank for part in file.parts] for of_rank in files] == [[], *([part] for part in three)]
    with pytest.raises(CheckpointError, match="tied, which is covered twice"):  # the last stage lacks a piece
        assign_writes([[one], *([part] for part in three[:2])], 1 << 30)


def test_a_rank_with_more_of_its_own_writes_fewer_replicas() -> None:
    own = Part("own", torch.float32, (1000,), full_box((1000,)))
    both = Part("both", torch.float32, (10,), full_box((10,)))
    first, second = assign_writes([[own, both], [both]], 1 << 30)
    assert [part.name for file in first for part in file.parts] == ["own"]
    assert [part.name for file in second for part in file.parts] == ["both"]


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=2),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 1),
    st.tuples(st.none() | st.integers(0, 1), st.none() | st.integers(0, 1)),
)
@settings(deadline=None)
def test_a_shard_within_shards_is_where_chunk_puts_it(
    shape: list[int], sizes: tuple[int, int, int], fsdp_axis: int, axes: tuple[int | None, int | None]
) -> None:
    """FSDP2 over expert and tensor parallelism: each cuts what the one before left, FSDP last."""
    beside = [size for size, axis in zip(sizes[1:], axes, strict=True) if axis == fsdp_axis]
    fsdp = _StridedShard(fsdp_axis, split_factor=math.prod(beside))
    placements = [fsdp, *(Replicate() if axis is None else Shard(axis) for axis in axes)]
    whole_tensor = torch.arange(math.prod(shape)).reshape(shape)
    for coordinate in itertools.product(*map(range, sizes)):
        local = whole_tensor
        for dim, axis in ((1, axes[0]), (2, axes[1]), (0, fsdp_axis)):
            if axis is not None:
                chunks, place = local.chunk(sizes[dim], axis), coordinate[dim]
                local = chunks[place] if place < len(chunks) else local.narrow(axis, 0, 0)
        box = box_within_shards(shape, placements, sizes, coordinate)
        assert box is not None
        assert torch.equal(whole_tensor[box.slices], local)


def test_what_fsdp_does_not_make_is_left_to_dtensor() -> None:
    for placements in (
        [Shard(0), Shard(0)],
        [_StridedShard(0, split_factor=3), Shard(0)],
        [Shard(0), _StridedShard(0, split_factor=2)],
    ):
        assert box_within_shards((8, 2), placements, (2, 2), (0, 1)) is None
