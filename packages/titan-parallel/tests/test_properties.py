"""Any degrees and options either work, or raise an error whose suggestions work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel_heads
from titan_parallel import (
    Degrees,
    LayoutError,
    ParallelModel,
    ParallelOptions,
    ParallelPlan,
    build_mesh,
    check_plan,
    parallelize,
)

SIZE = st.integers(1, 64)
SMALL = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(deadline=None)
@given(st.tuples(SMALL, SMALL), SIZE, st.one_of(st.none(), SIZE), st.integers(1, 16))
@example((8, 2), 32, None, 8)
def test_tensor_parallel(heads: tuple[int, int], vocabulary: int, sequence: int | None, tp: int) -> None:
    query, kv = heads[0] * heads[1], heads[1]
    plan: ParallelPlan = {
        "tensor": {"k": "colwise_kv"},
        "heads": (query, kv),
        "divisible": {"heads": query, "vocabulary": vocabulary},
    }
    sizes = [query, vocabulary] + ([] if sequence is None else [sequence])
    fits = all(size % tp == 0 for size in sizes) and (kv % tp == 0 or tp % kv == 0)
    try:
        check_plan(plan, Degrees(tp=tp), sequence_length=sequence)
        assert fits
    except LayoutError as error:
        assert not fits
        message, _, offered = str(error).partition("these degrees would: ")
        for size in sizes:
            assert size % tp == 0 or str(size) in message
        degrees = [int(degree) for degree in offered.strip("[]").split(", ")]
        assert degrees[0] == 1
        for degree in degrees:
            check_plan(plan, Degrees(tp=degree), sequence_length=sequence)


SPLITS: ParallelPlan = {"experts": ["experts"], "attention": ["core"], "sequence": {"x": 1}, "positions": None}


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(-2, 40))
def test_resharding_over_some_ranks(dp_shard: int, cp: int, ep: int, ranks: int) -> None:
    degrees = Degrees(dp_shard=dp_shard, cp=cp, ep=ep)
    try:
        check_plan(SPLITS, degrees, options=ParallelOptions(reshard_after_forward=ranks))
        assert 1 < ranks < dp_shard * cp * ep
        assert dp_shard * cp * ep % ranks == 0
    except LayoutError as error:
        for offered in re.findall(r"\d+", str(error).partition("these numbers would: ")[2]):
            check_plan(SPLITS, degrees, options=ParallelOptions(reshard_after_forward=int(offered)))


OPTIONS = st.fixed_dictionaries(
    {
        "param_dtype": st.sampled_from([None, "bfloat16"]),
        "reshard_after_forward": st.sampled_from(["default", "always", "never", 2, 4, True]),
        "reduce_every_microbatch": st.booleans(),
        "cpu_offload": st.booleans(),
        "sequence_parallel": st.booleans(),
        "async_tp": st.booleans(),
        "activation_checkpointing": st.sampled_from(["none", "full", "selective", "budget"]),
        "checkpoint_every": st.integers(0, 3),
        "save_ops": st.sampled_from([(), ("aten.mm",), ("aten.mmm",)]),
        "memory_budget": st.sampled_from([None, 0.5, 1.5]),
        "compile_blocks": st.booleans(),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries({"dp_replicate": SMALL, "dp_shard": st.sampled_from([-1, 1, 2, 4]), "tp": SMALL}),
    st.sampled_from([1, 2, 4]),
    st.one_of(st.just({}), OPTIONS),
    st.sampled_from([1, 2, 4, 8]),
)
@example({"dp_replicate": 1, "dp_shard": -1, "tp": 4}, 2, {"cpu_offload": True}, 8)
@example({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, 1, {"reshard_after_forward": 2}, 8)
def test_laying_out(chosen: dict[str, int], kv_heads: int, options: dict, world: int) -> None:
    """A model is laid out, or a LayoutError is raised before anything is sent; nothing else is raised."""
    with ranks(world):
        try:
            model = laid_out(Degrees(**chosen), kv_heads, ParallelOptions(**options))
        except LayoutError:
            return
        degrees = Degrees(**chosen).resolve(world)
        assert parallel_heads.HEADS % degrees.tp == 0
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        full = sum(parameter.numel() for parameter in model.parameters())
        assert held < full if degrees.tp * degrees.dp_shard > 1 else held == full


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 4))
def test_widths_that_tensor_parallelism_splits(heads: int, width: int, tp: int) -> None:
    """A plan need not list the sizes to divide: linears are inspected."""
    plan: ParallelPlan = {"tensor": {"0": "colwise", "1": "rowwise"}}

    def lay_out(degree: int) -> None:
        with ranks(degree):
            net = nn.Sequential(nn.Linear(4, heads * width, device="meta"), nn.Linear(heads * width, 4, device="meta"))
            parallelize(net, build_mesh(Degrees(tp=degree), "cpu"), plan)

    try:
        lay_out(tp)
        assert heads * width % tp == 0
    except LayoutError as error:
        message, _, offered = str(error).partition("; these degrees would: ")
        assert message == (
            f"tp {tp} does not divide the outputs of '0', {heads * width}; the inputs of '1', {heads * width}"
        )
        for degree in offered.strip("[]").split(", "):
            lay_out(int(degree))


def laid_out(degrees: Degrees, kv_heads: int, options: ParallelOptions) -> ParallelModel:
    mesh = build_mesh(degrees, "cpu")
    with torch.device("meta"):
        net = parallel_heads.build(kv_heads)
    return parallelize(net, mesh, parallel_heads.plan(kv_heads), options)


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """Be rank 0 of a fake process group: enough to lay out a model on meta, which sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
