"""Initial weights do not depend on the layout: each rank's shard is its slice of the unsharded initialisation.

A fake process group lets one process be each rank in turn. Nothing is communicated, which is the point: no rank needs
another to know its weights.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_model import DecoderConfig, build, init_parameters

NAME, SEED = "layers.1.ffn.up_proj.weight", 11
S0, S1, R = Shard(0), Shard(1), Replicate()


@contextmanager
def rank_of(rank: int, mesh_shape: Sequence[int]) -> Iterator[DeviceMesh]:
    """Be one rank of a world that holds just this mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(mesh_shape))
    try:
        # Torch caches what it derives from a mesh, its own coordinate included, for all meshes that compare equal;
        # names of its own keep each rank's mesh apart.
        names = tuple(f"rank{rank}_dim{i}" for i in range(len(mesh_shape)))
        yield init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def slice_of(
    whole: Tensor, mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> Tensor:
    """Split a whole tensor by the placements, mesh dim by mesh dim, with nothing but `torch.chunk`."""
    for size, place, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, Shard):
            chunks = whole.chunk(size, dim=placement.dim)
            whole = chunks[place] if place < len(chunks) else whole.narrow(placement.dim, 0, 0)
    return whole


def assert_shards_are_slices(
    config: DecoderConfig, shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> None:
    whole = torch.empty(*shape)
    init_parameters([(NAME, whole)], config, SEED)
    coordinates = itertools.product(*(range(size) for size in mesh_shape))
    for rank, coordinate in enumerate(coordinates):
        with rank_of(rank, mesh_shape) as mesh:
            sharded = zeros(*shape, device_mesh=mesh, placements=list(placements))
            init_parameters([(NAME, sharded)], config, SEED)
            local = sharded.to_local()
        assert torch.equal(local, slice_of(whole, mesh_shape, coordinate, placements)), (rank, placements)


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        ((4,), (S0,)),
        ((4,), (S1,)),
        ((4,), (R,)),
        *(((2, 3), placements) for placements in itertools.product((S0, S1, R), repeat=2)),
        ((2, 2, 2), (R, S0, S1)),
        ((2, 2, 2), (S0, S1, S0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(12, 12), (7, 5), (2, 9)], ids=["even", "uneven", "some ranks empty"])
def test_every_rank_draws_its_slice(
    tiny: DecoderConfig, shape: tuple[int, int], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    assert_shards_are_slices(tiny, shape, mesh_shape, placements)


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    layout=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([S0, S1, R])), min_size=1, max_size=2),
)
def test_any_layout(tiny: DecoderConfig, shape: tuple[int, int], layout: list[tuple[int, Placement]]) -> None:
    mesh_shape, placements = zip(*layout, strict=True)
    assert_shards_are_slices(tiny, shape, mesh_shape, placements)


@pytest.mark.parametrize("placement", [S0, S1], ids=str)
def test_shards_of_more_than_one_chunk(
    tiny: DecoderConfig, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_model.initialisation._CHUNK", 7)  # across rows, and not at their ends
    assert_shards_are_slices(tiny, (11, 10), (3,), (placement,))


def whole_state(config: DecoderConfig) -> dict[str, Tensor]:
    model = build(config, "cpu")
    init_parameters(model.named_parameters(), config, SEED)
    return model.state_dict()


def local_state(config: DecoderConfig, rank: int, dp: int, tp: int) -> dict[str, Tensor]:
    """Build on meta, split projections by tensor parallelism, then FSDP, materialise and initialise one rank."""
    with rank_of(rank, (dp, tp)) as mesh:
        dp_dim, tp_dim = mesh.mesh_dim_names or ()
        model = build(config)
        column, row = ColwiseParallel(), RowwiseParallel()
        styles: dict[str, ParallelStyle] = {
            **{f"attn.{name}_proj": column for name in "qkv"},
            "attn.o_proj": row,
            "ffn.gate_proj": column,
            "ffn.up_proj": column,
            "ffn.down_proj": row,
        }
        for block in model.layers.values():
            if tp > 1:
                parallelize_module(block, mesh[tp_dim], styles)
            fully_shard(block, mesh=mesh[dp_dim])
        fully_shard(model, mesh=mesh[dp_dim])
        model.to_empty(device="cpu")
        init_parameters(model.named_parameters(), config, SEED)
        parameters = dict(model.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        return {name: parameter.to_local().detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("dp", "tp"), [(4, 1), (3, 2), (2, 2), (5, 2)], ids=str)
def test_fsdp_and_tensor_parallel_from_meta(tiny: DecoderConfig, dp: int, tp: int, tied: bool) -> None:
    # 37 embedding rows, heads and widths that the data-parallel degree does not divide: uneven and empty shards.
    config = replace(tiny, ffn_dim=44, tied_embeddings=tied)
    whole = whole_state(config)
    whole_names = {name for name, _ in build(config).named_parameters()}
    for rank, (dp_rank, tp_rank) in enumerate(itertools.product(range(dp), range(tp))):
        local = local_state(config, rank, dp, tp)
        assert local.keys() == whole_names
        for name, value in local.items():
            # Tensor parallelism splits first, FSDP splits what is left, whatever the order of the mesh.
            split = [] if "_proj" not in name else [Shard(1 if "o_proj" in name or "down_proj" in name else 0)]
            expected = slice_of(whole[name], [tp] * len(split), [tp_rank] * len(split), split)
            expected = slice_of(expected, [dp], [dp_rank], [S0])
            assert torch.equal(value, expected), (name, rank)
