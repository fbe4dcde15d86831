"""Initial weights do not depend on the layout: each rank's shard is its slice of the unsharded initialization.

A fake process group lets one process be each rank in turn. Nothing is communicated, which is the point: no rank needs
another to know its weights.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_model import DecoderConfig, build, init_parameters, preset
from titan_model.config import MoEConfig
from titan_model.counter_rng import truncated_normal

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
    """Split a full tensor by the placements, mesh dim by mesh dim, with nothing but `torch.chunk`."""
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
    monkeypatch.setattr("titan_model.init._CHUNK", 7)  # across rows, and not at their ends
    assert_shards_are_slices(tiny, (11, 10), (3,), (placement,))


def whole_state(config: DecoderConfig) -> dict[str, Tensor]:
    model = build(config, "cpu")
    init_parameters(model.named_parameters(), config, SEED)
    return model.state_dict()


def over_experts_or_within(parameter: nn.Parameter) -> Shard:
    """Shard the tensors of experts over the dim after theirs, as for more ranks than experts."""
    return Shard(1 if parameter.dim() == 3 else 0)


def local_state(
    config: DecoderConfig, rank: int, dp: int, tp: int, placement: Callable[[nn.Parameter], Shard] | None = None
) -> dict[str, Tensor]:
    """Build on meta, split projections by tensor parallelism, then FSDP, materialize and initialize one rank."""
    with rank_of(rank, (dp, tp)) as mesh:
        dp_dim, tp_dim = mesh.mesh_dim_names or ()
        model = build(config, "meta")
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
            fully_shard(block, mesh=mesh[dp_dim], shard_placement_fn=placement)
        fully_shard(model, mesh=mesh[dp_dim])
        model.to_empty(device="cpu")
        init_parameters(model.named_parameters(), config, SEED)
        parameters = dict(model.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        assert not any(buffer.any() for buffer in model.buffers())
        return {name: parameter.to_local().detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("dp", "tp"), [(4, 1), (3, 2), *(pytest.param(*two, marks=pytest.mark.slow) for two in ((2, 2), (5, 2)))], ids=str
)
def test_fsdp_and_tensor_parallel_from_meta(tiny: DecoderConfig, dp: int, tp: int, tied: bool) -> None:
    # 37 embedding rows, heads and widths that the data-parallel degree does not divide: uneven and empty shards.
    config = replace(tiny, ffn_dim=44, tied_embeddings=tied, norm="layernorm")
    whole = whole_state(config)
    whole_names = {name for name, _ in build(config, "meta").named_parameters()}
    for rank, (dp_rank, tp_rank) in enumerate(itertools.product(range(dp), range(tp))):
        local = local_state(config, rank, dp, tp)
        assert local.keys() == whole_names
        for name, value in local.items():
            # Tensor parallelism splits first, FSDP splits what is left, whatever the order of the mesh.
            split = [] if "_proj" not in name else [Shard(1 if "o_proj" in name or "down_proj" in name else 0)]
            expected = slice_of(whole[name], [tp] * len(split), [tp_rank] * len(split), split)
            expected = slice_of(expected, [dp], [dp_rank], [S0])
            assert torch.equal(value, expected), (name, rank)


@pytest.mark.parametrize("within", [False, True], ids=["over experts", "within experts"])
@pytest.mark.parametrize("dp", [2, 4, 8])
def test_experts_from_meta(tiny: DecoderConfig, dp: int, within: bool) -> None:
    # Three experts: over four ranks or more some have none, unless each expert is split.
    moe = MoEConfig(n_experts=3, top_k=1, ffn_dim=8, shared_ffn_dim=5, dense_layers=(0,), balance_bias_rate=0.1)
    config = replace(tiny, moe=moe, qk_norm=True)
    whole = whole_state(config)
    for rank in range(dp):
        local = local_state(config, rank, dp, 1, over_experts_or_within if within else None)
        for name, value in local.items():
            placement = Shard(1 if within and ".experts." in name else 0)
            assert torch.equal(value, slice_of(whole[name], [dp], [rank], [placement])), (name, rank)


def test_a_rank_of_405b_draws_its_shard_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # One of its 126 blocks on 64 x 8 ranks: 3.2 billion weights, of which this rank has a five-hundredth.
    config = replace(preset("llama3_1_405b"), n_layers=1, vocab_size=8)
    drawn: list[int] = []

    def counting(key: int, indices: Tensor, bound: float) -> Tensor:
        drawn.append(indices.numel())
        return truncated_normal(key, indices, bound)

    monkeypatch.setattr("titan_model.init.truncated_normal", counting)
    held = sum(value.numel() for value in local_state(config, 511, 64, 8).values() if value.dim() > 1)
    assert held == sum(drawn)
    assert 6_000_000 < held < 6_500_000
    assert max(drawn) <= 1 << 20  # what is needed besides is bounded
