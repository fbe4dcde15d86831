"""Properties of schedules computed without processes agree with torch's classes; files and splits are checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel_pipeline as cases
from parallel_makespan import makespan
from titan_parallel import (
    SCHEDULES,
    LayoutError,
    PipelineOptions,
    bubble_share,
    check_pipeline,
    choose_microbatches,
)
from titan_parallel.pipeline.balance import balance, split_blocks
from titan_parallel.pipeline.schedule_csv import Action, check_order, read_schedule
from titan_parallel.pipeline.schedules import place_stages
from titan_parallel.plan import find_roles

COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16]
LAYOUTS = [(name, v) for name in SCHEDULES for v in ((1,) if name in ("GPipe", "1F1B") else (2,))] + [
    ("InterleavedZeroBubble", 1),
    ("Interleaved1F1B", 3),
]


@contextmanager
def ranks(pp: int) -> Iterator[None]:
    """Be rank 0 of a fake process group of `pp` ranks."""
    logging.disable(logging.WARNING)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=pp)
    try:
        yield
    finally:
        dist.destroy_process_group()
        logging.disable(logging.NOTSET)


def torch_schedule(name: str, pp: int, per_rank: int, microbatches: int) -> Any:
    """Return torch's own schedule, on stages that compute nothing."""
    x = torch.empty(1, device="meta")
    placed = place_stages(PipelineOptions(schedule=name, stages_per_rank=per_rank), pp)
    stages = [
        PipelineStage(nn.Linear(1, 1), index, pp * per_rank, torch.device("cpu"), input_args=(x,), output_args=(x,))
        for index in placed.of(0)
    ]
    kind: Any = get_schedule_class(name)
    return kind(stages[0] if name in ("GPipe", "1F1B") else stages, n_microbatches=microbatches, loss_fn=lambda x, y: x)


def actions(schedule: Any) -> dict[int, list[Action]]:
    return {
        rank: [
            Action(one.stage_index, one.computation_type.value, one.microbatch_index)
            for action in row
            if action is not None
            for one in (action.sub_actions or (action,))
            if one.computation_type.value in ("F", "B", "I", "W")
        ]
        for rank, row in schedule.pipeline_order.items()
    }


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_microbatches_and_bubbles_are_those_of_torch(pp: int) -> None:
    with ranks(pp):
        for name, per_rank in LAYOUTS:
            options = PipelineOptions(schedule=name, stages_per_rank=per_rank)
            for count in COUNTS:
                try:
                    schedule = torch_schedule(name, pp, per_rank, count)
                except ValueError:
                    with pytest.raises(LayoutError, match=f"{name} on {pp} ranks takes .* these numbers would fit"):
                        check_pipeline(pp, options, microbatches=count)
                    continue
                check_pipeline(pp, options, microbatches=count)
                share = bubble_share(name, pp, per_rank, count)
                if name == "1F1B":  # torch's own order of it is not what it runs
                    assert share == pytest.approx((pp - 1) / (count + pp - 1))
                    continue
                order = actions(schedule)
                time = makespan(order)
                real = 1 - 3 * per_rank * count / time
                if name == "InterleavedZeroBubble" and count < pp:
                    assert 0 < share <= real + 1e-9
                else:
                    assert share == pytest.approx(real), (name, pp, per_rank, count)


def test_stages_lie_where_torch_has_them() -> None:
    with ranks(3):
        for name, per_rank in LAYOUTS:
            schedule = torch_schedule(name, 3, per_rank, 6)
            if name in ("GPipe", "1F1B"):
                continue
            placed = place_stages(PipelineOptions(schedule=name, stages_per_rank=per_rank), 3)
            assert dict(enumerate(placed.ranks)) == schedule.stage_index_to_group_rank
            kinds = {action.kind for row in actions(schedule).values() for action in row}
            assert placed.splits_backward is bool(kinds & {"I", "W"})


def test_unknown_schedule() -> None:
    with pytest.raises(
        LayoutError, match=r"unknown pipeline schedule '1F1b' \(did you mean '1F1B'\?\); use one of GPipe, "
    ):
        check_pipeline(2, PipelineOptions(schedule="1F1b"))
    check_pipeline(1, PipelineOptions(schedule="1F1b"))  # there is no pipeline


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (PipelineOptions(stages_per_rank=2), "1F1B takes 1 stage(s) per rank, but pipeline.stages_per_rank is 2"),
        (PipelineOptions(schedule="DualPipeV", stages_per_rank=1), "DualPipeV takes 2 stage(s) per rank"),
        (PipelineOptions(schedule="LoopedBFS", stages_per_rank=0), "LoopedBFS takes one or more stage(s) per rank"),
        (
            PipelineOptions(split=("a", "b")),
            "pipeline.split: 2 stages (pp 2 x 1 per rank) need the names of 1 blocks, without",
        ),
        (PipelineOptions(split=("d",)), "pipeline.split: not the names of blocks: d (nearest to the first:"),
        (
            PipelineOptions(split=("a",)),
            "pipeline.split: must name blocks in the model's order, each once and without the first, a",
        ),
        (
            PipelineOptions(schedule="ZBVZeroBubble", split=("b", "c", "b")),
            "there are 4 pipeline stages (pp 2 x 2 per rank), but only 3 blocks",
        ),
    ],
)
def test_stages_that_cannot_be(options: PipelineOptions, says: str) -> None:
    with pytest.raises(LayoutError) as error:
        check_pipeline(2, options, blocks=["a", "b", "c"])
    assert says in str(error.value)


def test_numbers_that_would_do() -> None:
    for schedule, count, says in (
        ("1F1B", 2, "at least as many as ranks, 4, but there are 2 microbatches; these numbers would fit: [4, 5, 6]"),
        (
            "DualPipeV",
            6,
            "at least as many as stages, 8, but there are 6 microbatches; these numbers would fit: [8, 9, 10]",
        ),
        (
            "Interleaved1F1B",
            9,
            "which is microbatches // 4, but there are 9 microbatches; these numbers would fit: [7, 8, 10]",
        ),
    ):
        with pytest.raises(LayoutError) as error:
            check_pipeline(4, PipelineOptions(schedule=schedule), microbatches=count)
        assert says in str(error.value)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 8),
    st.integers(1, 64),
    st.sampled_from([0.01, 0.1, 0.3]),
)
def test_chosen_microbatches(schedule: str, pp: int, sequences: int, max_bubble_share: float) -> None:
    options = PipelineOptions(schedule=schedule)
    per_rank = 1 if schedule in ("GPipe", "1F1B") else 2
    shares: dict[int, float] = {}
    for count in (n for n in range(1, sequences + 1) if sequences % n == 0):
        with suppress(LayoutError):  # not taken by the schedule
            shares[count] = bubble_share(schedule, pp, per_rank, count)
    if not shares and pp > 1:
        with pytest.raises(LayoutError, match=f"{sequences} sequences per rank do not divide"):
            choose_microbatches(options, pp, sequences, max_bubble_share=max_bubble_share)
        return
    chosen = choose_microbatches(options, pp, sequences, max_bubble_share=max_bubble_share)
    good = [count for count, share in shares.items() if share <= max_bubble_share]
    assert chosen == (min(good) if good else min(shares, key=lambda count: shares[count]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=9),
    st.integers(1, 9),
    st.floats(0, 3),
    st.floats(0, 3),
)
def test_balance_is_best(costs: list[float], stages: int, first: float, last: float) -> None:
    stages = min(stages, len(costs))
    sizes = balance(costs, stages, first=first, last=last)
    assert len(sizes) == stages
    assert sum(sizes) == len(costs)
    assert min(sizes) > 0

    def busiest(lengths: list[int]) -> float:
        starts = [sum(lengths[:i]) for i in range(stages)]
        loads = [sum(costs[start : start + size]) for start, size in zip(starts, lengths, strict=True)]
        loads[0] += first
        loads[-1] += last
        return max(loads)

    def ways(count: int, parts: int) -> Iterator[list[int]]:
        if parts == 1:
            yield [count]
            return
        for one in range(1, count - parts + 2):
            for rest in ways(count - one, parts - 1):
                yield [one, *rest]

    assert busiest(sizes) == pytest.approx(min(busiest(way) for way in ways(len(costs), stages)))


def test_equal_blocks_are_spread_evenly() -> None:
    assert balance([1.0] * 9, 4) in ([2, 2, 2, 3], [3, 2, 2, 2], [2, 3, 2, 2], [2, 2, 3, 2])
    assert balance([1.0] * 8, 2, first=2) == [3, 5]
    assert balance([1.0] * 8, 4, first=1, last=1) == [1, 2, 3, 2]
    assert balance([1.0] * 32, 4, last=2.4)[-1] < 8


def test_split_counts_what_is_computed() -> None:
    net = cases.build(False, 6)
    roles = find_roles(net, cases.plan(False))
    head = nn.Linear(cases.DIM, 2 * sum(p.numel() for p in net.stack[0].parameters()) // cases.DIM, bias=False)
    net.vocab_out = head  # as much work as two blocks
    sizes = [len(names) for names in split_blocks(net, roles, 2, PipelineOptions())]
    assert sizes == [4, 2]
    sizes = [len(names) for names in split_blocks(net, roles, 2, PipelineOptions(first_stage_less=2))]
    assert sizes == [3, 3]
    sizes = [len(names) for names in split_blocks(net, roles, 2, PipelineOptions(last_stage_less=0))]
    assert sizes == [3, 3]


GOOD = "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"


def test_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.csv"
    path.write_text(GOOD)
    file = read_schedule(str(path), 2)
    assert (file.ranks, file.microbatches, file.splits_backward) == ((0, 1), 2, False)
    assert choose_microbatches(PipelineOptions(schedule=str(path)), 2, 8) == 2
    check_order(file)
    with pytest.raises(LayoutError, match="no formula for a schedule from a file"):
        bubble_share(str(path), 2, 1, 2)


@pytest.mark.parametrize(
    "text",
    [GOOD.replace("1F0,1B0", "1B0,1F0"), "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"],
    ids=["on one rank", "between ranks"],
)
def test_files_whose_actions_wait_forever(tmp_path: Path, text: str) -> None:
    path = tmp_path / "waits.csv"
    path.write_text(text)
    with pytest.raises(LayoutError, match=r"waits\.csv: its actions cannot run in this order, .* \(torch: "):
        check_order(read_schedule(str(path), 2))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0F0,0B0\n", "has 1 rows with actions, but pp=2 requires 2"),
        (GOOD.replace("0F0", "0X0"), "invalid action '0X0'"),
        (
            GOOD.replace("1F0", "2F0").replace("1B0", "2B0").replace("1F1", "2F1").replace("1B1", "2B1"),
            "has no actions of stages [1]",
        ),
        (GOOD.replace("0B1", "1F2"), "has stages on several ranks: {1: [0, 1]}"),
        (
            GOOD.replace("1B1", ""),
            "one F and either one B or one I and one W for each of the 2 microbatches; this does not hold for "
            "stage 1, microbatch 1",
        ),
        (
            GOOD.replace("1F0,1B0,1F1,1B1", "1F1,1B1,1F0,1B0"),
            "the last stage must run the microbatches in their order",
        ),
        (GOOD + "2F0,2B0\n", "has 3 rows with actions, but pp=2 requires 2"),
    ],
    ids=["rows", "action", "stage", "ranks", "missing", "order", "more"],
)
def test_files_that_cannot_run(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(LayoutError) as error:
        check_pipeline(2, PipelineOptions(schedule=str(path)))
    assert says in str(error.value)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"none\.csv: No such file"):
        check_pipeline(2, PipelineOptions(schedule=str(tmp_path / "none.csv")))
    path = tmp_path / "back.csv"
    path.write_text("1F0,1B0\n0F0,0B0\n")
    with pytest.raises(LayoutError, match=r"has its stages on ranks \[1, 0\]; place them in a loop, \[0, 1\]"):
        check_pipeline(2, PipelineOptions(schedule=str(path)))
    path.write_text(GOOD)
    with pytest.raises(LayoutError, match=r"has 2 stages for 2 ranks, but pipeline\.stages_per_rank is 2"):
        check_pipeline(2, PipelineOptions(schedule=str(path), stages_per_rank=2))
    with pytest.raises(LayoutError, match="takes 2, as the file has, but there are 3 microbatches"):
        check_pipeline(2, PipelineOptions(schedule=str(path)), microbatches=3)
    with pytest.raises(LayoutError, match="1F1B takes 1 stage"):
        bubble_share("1F1B", 2, 2, 4)
