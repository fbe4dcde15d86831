"""Pipeline schedules by name: which stages lie on which rank, how many microbatches they take, what they leave idle.

The classes that run them are torch's. What is known here needs neither a model nor processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from titan_parallel.errors import LayoutError
from titan_parallel.options import PipelineOptions
from titan_parallel.pipeline.schedule_csv import ScheduleFile, read_schedule

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")

_SINGLE = ("GPipe", "1F1B")  # one stage on each rank
_V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # two, the second on the way back
_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")
_SPLITTING = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")  # backward in two halves
_OFFERED = 3  # numbers in a message


@dataclass(frozen=True)
class Stages:
    """Where the stages of a pipeline lie.

    Attributes:
        ranks: For each stage in the model's order, its rank within the pipeline.
        v_shaped: Whether they go there and back (0, 1, 1, 0) rather than round and round (0, 1, 0, 1).
        splits_backward: Whether the schedule computes gradients of inputs and of weights apart.
        file: The schedule, where it comes from a file.
    """

    ranks: tuple[int, ...]
    v_shaped: bool
    splits_backward: bool
    file: ScheduleFile | None = None

    def of(self, rank: int) -> list[int]:
        """Return the stages on a rank."""
        return [stage for stage, where in enumerate(self.ranks) if where == rank]


def place_stages(options: PipelineOptions, pp: int) -> Stages:
    """Return where the stages lie that a schedule asks for.

    Raises:
        LayoutError: If there is no such schedule, or it does not take so many stages per rank.
    """
    name, wanted = options.schedule, options.stages_per_rank
    if name.endswith(".csv"):
        file = read_schedule(name, pp)
        ranks = tuple(file.ranks)
        if wanted is not None and wanted * pp != len(ranks):
            raise LayoutError(f"{name} has {len(ranks)} stages for {pp} ranks, but stages_per_rank is {wanted}")
        for v_shaped in (False, True):
            if ranks == _ranks(pp, len(ranks) // pp, v_shaped):
                return Stages(ranks, v_shaped, file.splits_backward, file)
        raise LayoutError(
            f"{name} puts its stages on ranks {list(ranks)}; they have to go round the ranks, "
            f"{list(_ranks(pp, len(ranks) // pp, False))}, or there and back, {list(_ranks(pp, 2, True))}"
        )
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise LayoutError(
            f"unknown pipeline schedule {name!r}{hint}; there are {', '.join(SCHEDULES)}, and files whose names end "
            "in .csv"
        )
    count = wanted if wanted is not None else 1 if name in _SINGLE else 2
    allowed = "1" if name in _SINGLE else "2" if name in _V_SHAPED else None
    if (allowed is not None and str(count) != allowed) or count < 1:
        raise LayoutError(
            f"pipeline schedule {name} has {allowed or 'one or more'} stage(s) per rank, but stages_per_rank is {count}"
        )
    return Stages(_ranks(pp, count, name in _V_SHAPED), name in _V_SHAPED, name in _SPLITTING)


def check_pipeline(
    pp: int,
    options: PipelineOptions,
    *,
    blocks: Sequence[str] | None = None,
    microbatches: int | None = None,
) -> None:
    """Check what can be known of a pipeline before it is built, without a model and without processes.

    Args:
        pp: The pipeline-parallel degree; with 1 there is nothing to check.
        options: Schedule and stages.
        blocks: Names of the model's blocks in their order, if known.
        microbatches: Of one step on one rank, if known.

    Raises:
        LayoutError: With what does not fit, and what would.
    """
    if pp == 1:
        return
    stages = place_stages(options, pp)
    count = len(stages.ranks)
    if options.split and len(options.split) != count - 1:
        raise LayoutError(
            f"{count} stages (pp {pp} x {count // pp} per rank) begin at {count - 1} blocks beside the first, but "
            f"split names {len(options.split)}: {', '.join(options.split)}"
        )
    if blocks is not None:
        _check_blocks(pp, count, blocks, options.split)
    if microbatches is not None:
        _check_microbatches(pp, stages, options, microbatches)


def bubble_share(schedule: str, pp: int, stages_per_rank: int, microbatches: int) -> float:
    """Return the share of a step in which a rank waits, on average over ranks, if nothing but computing took time.

    A step lasts from the first begin to the last end; stages take equally long, and of a stage's work on a microbatch
    a third each goes to the forward, to the gradients of inputs and to those of weights. With p ranks, v stages on
    each and m >= p microbatches, work is 3 v m, and the time that is waited:

    - GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B, interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473) and
      looped BFS (Lamy-Poirier 2023, arXiv:2211.05953): 3 (p - 1);
    - interleaved zero bubble (Qi et al. 2023, arXiv:2401.10241, ZB-H1 or ZB1P) and, where m is about 2 p, ZBV (there,
      ZB-V) and DualPipeV (DeepSeek-V3, arXiv:2412.19437, folded): p - 1.

    The whole of it is exact for torch's orders but for interleaved zero bubble with m < p, where it is a bound from
    below. Where backward is not split (compiled blocks) the last three come near the first ones.

    Args:
        schedule: One of `SCHEDULES`, or the path of a CSV file.
        pp: Ranks.
        stages_per_rank: Stages on each.
        microbatches: Microbatches of a step.

    Raises:
        LayoutError: If the schedule does not take these numbers.
    """
    options = PipelineOptions(schedule=schedule, stages_per_rank=stages_per_rank)
    check_pipeline(pp, options, microbatches=microbatches)
    p, v, m = pp, stages_per_rank, microbatches
    file = place_stages(options, pp).file if pp > 1 else None
    if file is not None:
        return file.bubble_share
    work = 3 * v * m
    if pp == 1:
        return 0.0
    if schedule == "InterleavedZeroBubble":
        time = max(work + p - 1, 2 * (v * p + m) - 1)
    elif schedule in _V_SHAPED:
        time = max(work + p - 1, 4 * (p + m) - 2)
    else:
        time = 3 * max(v * m + p - 1, v * p + m - 1)
    return 1 - work / time


def choose_microbatches(options: PipelineOptions, pp: int, rows: int, *, most_idle: float = 0.1) -> int:
    """Return into how many microbatches to cut a rank's rows: as few as keep the pipeline busy.

    Args:
        options: Schedule and stages.
        pp: Ranks of the pipeline.
        rows: Rows of a step on one rank; each microbatch gets equally many.
        most_idle: The bubble share to stay under, if any number does; else the number with the least is taken.

    Raises:
        LayoutError: If the schedule takes no number that divides `rows`.
    """
    if pp == 1:
        return 1
    stages = place_stages(options, pp)
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    fitting = [n for n in divisors if _takes(options.schedule, pp, stages, n)]
    if not fitting:
        raise LayoutError(
            f"{rows} rows per rank cannot be cut into a number of equal microbatches that pipeline schedule "
            f"{options.schedule} takes on {pp} ranks: {_offer(options.schedule, pp, stages, rows)} would do"
        )
    per_rank = len(stages.ranks) // pp
    shares = {n: bubble_share(options.schedule, pp, per_rank, n) for n in fitting}
    return next((n for n in fitting if shares[n] <= most_idle), min(fitting, key=lambda n: shares[n]))


def _ranks(pp: int, per_rank: int, v_shaped: bool) -> tuple[int, ...]:
    one_way = list(range(pp))
    if v_shaped:
        return tuple(one_way + one_way[::-1])
    return tuple(one_way * per_rank)


def _check_blocks(pp: int, count: int, blocks: Sequence[str], split: Sequence[str]) -> None:
    if count > len(blocks):
        raise LayoutError(
            f"there are {count} pipeline stages (pp {pp} x {count // pp} per rank), but only {len(blocks)} blocks; "
            "take a smaller pp or fewer stages per rank"
        )
    unknown = [name for name in split if name not in blocks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], blocks, n=3, cutoff=0.4) or list(blocks[1:4])
        raise LayoutError(
            f"split names what is no block: {', '.join(unknown)} (nearest to the first: {', '.join(near)})"
        )
    places = [blocks.index(name) for name in split]
    if any(later <= earlier for earlier, later in zip([0, *places], places, strict=False)):
        raise LayoutError(
            f"split has to name blocks in the model's order, each once and not the first, {blocks[0]}; it is "
            f"{', '.join(split)}"
        )


def _check_microbatches(pp: int, stages: Stages, options: PipelineOptions, microbatches: int) -> None:
    if _takes(options.schedule, pp, stages, microbatches):
        return
    rules = {
        "1F1B": f"at least as many as ranks, {pp}",
        "DualPipeV": f"at least as many as stages, {len(stages.ranks)}",
        **dict.fromkeys(_ROUNDS, f"a multiple of the number of rounds, which is microbatches // {pp}"),
    }
    rule = rules.get(options.schedule, f"{stages.file.microbatches}, as the file has" if stages.file else "")
    raise LayoutError(
        f"pipeline schedule {options.schedule} on {pp} ranks takes {rule}, but there are {microbatches} microbatches; "
        f"these numbers would do: {_offer(options.schedule, pp, stages, microbatches)}"
    )


def _takes(schedule: str, pp: int, stages: Stages, microbatches: int) -> bool:
    """Whether torch's class of a schedule takes a number of microbatches."""
    if microbatches < 1:
        return False
    if stages.file is not None:
        return microbatches == stages.file.microbatches
    if schedule in _ROUNDS:
        return microbatches % max(1, microbatches // pp) == 0
    least = {"1F1B": pp, "DualPipeV": len(stages.ranks)}
    return microbatches >= least.get(schedule, 1)


def _offer(schedule: str, pp: int, stages: Stages, near: int) -> list[int]:
    """Return the nearest numbers of microbatches that a schedule takes."""
    if stages.file is not None:
        return [stages.file.microbatches]
    fitting = [n for n in range(1, near + 4 * pp) if _takes(schedule, pp, stages, n)]
    return sorted(sorted(fitting, key=lambda n: abs(n - near))[:_OFFERED])
