"""Pipeline schedules by name: placement of stages, numbers of microbatches, and the share of time that ranks idle.

The classes that run them are torch's. The functions here need neither a model nor processes. Used by `check_pipeline`
and `choose_microbatches` before a run, and by `build`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from titan_parallel.errors import LayoutError
from titan_parallel.options import PipelineOptions
from titan_parallel.pipeline.schedule_csv import ScheduleFile, read_schedule

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")

_SINGLE = ("GPipe", "1F1B")  # one stage per rank
_V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # two stages per rank, the second in reverse order of ranks
_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")
_SPLITTING = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")  # backward in two halves
_OFFERED = 3  # suggestions in a message


@dataclass(frozen=True)
class StagePlacement:
    """Which stages of a pipeline are on which rank.

    Attributes:
        ranks: For each stage in the model's order, its rank within the pipeline.
        v_shaped: Whether the order of ranks is V-shaped (0, 1, 1, 0) rather than a loop (0, 1, 0, 1).
        splits_backward: Whether the schedule computes gradients of inputs and of weights separately.
        file: The schedule, if it is from a file.
    """

    ranks: tuple[int, ...]
    v_shaped: bool
    splits_backward: bool
    file: ScheduleFile | None = None

    def of(self, rank: int) -> list[int]:
        """Return the stages on a rank."""
        return [stage for stage, where in enumerate(self.ranks) if where == rank]


def place_stages(options: PipelineOptions, pp: int) -> StagePlacement:
    """Return the placement of stages for a schedule.

    Raises:
        LayoutError: If the schedule is unknown, or does not take this number of stages per rank.
    """
    name, wanted = options.schedule, options.stages_per_rank
    if name.endswith(".csv"):
        file = read_schedule(name, pp)
        ranks = tuple(file.ranks)
        if wanted is not None and wanted * pp != len(ranks):
            raise LayoutError(
                f"pipeline schedule {name}: has {len(ranks)} stages for {pp} ranks, but pipeline.stages_per_rank "
                f"is {wanted}"
            )
        for v_shaped in (False, True):
            if ranks == _ranks(pp, len(ranks) // pp, v_shaped=v_shaped):
                return StagePlacement(ranks, v_shaped, file.splits_backward, file)
        raise LayoutError(
            f"pipeline schedule {name}: has its stages on ranks {list(ranks)}; place them in a loop, "
            f"{list(_ranks(pp, len(ranks) // pp, v_shaped=False))}, or in a V, {list(_ranks(pp, 2, v_shaped=True))}"
        )
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise LayoutError(
            f"unknown pipeline schedule {name!r}{hint}; use one of {', '.join(SCHEDULES)}, or the path of a .csv file"
        )
    count = wanted if wanted is not None else 1 if name in _SINGLE else 2
    allowed = "1" if name in _SINGLE else "2" if name in _V_SHAPED else None
    if (allowed is not None and str(count) != allowed) or count < 1:
        raise LayoutError(
            f"pipeline schedule {name} takes {allowed or 'one or more'} stage(s) per rank, but "
            f"pipeline.stages_per_rank is {count}"
        )
    v_shaped = name in _V_SHAPED
    return StagePlacement(_ranks(pp, count, v_shaped=v_shaped), v_shaped, name in _SPLITTING)


def check_pipeline(
    pp: int,
    options: PipelineOptions,
    *,
    blocks: Sequence[str] | None = None,
    microbatches: int | None = None,
) -> None:
    """Check pipeline options before a pipeline is built, without a model and without processes.

    Args:
        pp: The pipeline-parallel degree; 1 passes always.
        options: Schedule and stages.
        blocks: Names of the model's blocks in order, if known.
        microbatches: Number of microbatches of one step on one rank, if known.

    Raises:
        LayoutError: If something does not fit; the message says what would.
    """
    if pp == 1:
        return
    placement = place_stages(options, pp)
    count = len(placement.ranks)
    if options.split and len(options.split) != count - 1:
        raise LayoutError(
            f"pipeline.split: {count} stages (pp {pp} x {count // pp} per rank) need the names of {count - 1} blocks, "
            f"without the first stage's, but it has {len(options.split)}: {', '.join(options.split)}"
        )
    if blocks is not None:
        _check_blocks(pp, count, blocks, options.split)
    if microbatches is not None:
        _check_microbatches(pp, placement, options, microbatches)


def bubble_share(schedule: str, pp: int, stages_per_rank: int, microbatches: int) -> float:
    """Return the share of a step in which ranks are idle, on average over ranks, if communication took no time.

    A step lasts from the first begin to the last end. Stages take equally long, and a stage's work on a microbatch is
    one third each for the forward, the gradients of inputs and those of weights. With p ranks, v stages on each and
    m >= p microbatches, work is 3 v m, and the idle time:

    - GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B, interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473) and
      looped BFS (Lamy-Poirier 2023, arXiv:2211.05953): 3 (p - 1);
    - interleaved zero bubble (Qi et al. 2023, arXiv:2401.10241, ZB-H1 or ZB1P) and, where m is about 2 p, ZBV (there,
      ZB-V) and DualPipeV (DeepSeek-V3, arXiv:2412.19437, folded): p - 1.

    This is exact for torch's orders, except for interleaved zero bubble with m < p, where it is a lower bound. If
    backward is not split (compiled or checkpointed blocks) the last three are close to the others.

    Args:
        schedule: One of `SCHEDULES`.
        pp: Number of ranks.
        stages_per_rank: Number of stages on each rank.
        microbatches: Number of microbatches of a step.

    Raises:
        LayoutError: If the schedule does not take these numbers, or is a CSV file, for which there is no formula.
    """
    if pp > 1 and schedule.endswith(".csv"):
        raise LayoutError(f"bubble_share: there is no formula for a schedule from a file, {schedule}")
    options = PipelineOptions(schedule=schedule, stages_per_rank=stages_per_rank)
    check_pipeline(pp, options, microbatches=microbatches)
    p, v, m = pp, stages_per_rank, microbatches
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


def choose_microbatches(options: PipelineOptions, pp: int, sequences: int, *, max_bubble_share: float = 0.1) -> int:
    """Return the number of microbatches for a rank's sequences: as few as keep the pipeline busy.

    Args:
        options: Schedule and stages.
        pp: Number of ranks of the pipeline.
        sequences: Sequences of a step on one rank; each microbatch gets the same number.
        max_bubble_share: The bubble share to stay under if possible; else the number with the smallest share is chosen.

    Raises:
        LayoutError: If the schedule takes no number of microbatches that divides `sequences`.
    """
    if pp == 1:
        return 1
    placement = place_stages(options, pp)
    divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
    fitting = [n for n in divisors if _takes(options.schedule, pp, placement, n)]
    if not fitting:
        raise LayoutError(
            f"{sequences} sequences per rank do not divide into a number of microbatches that pipeline schedule "
            f"{options.schedule} takes on {pp} ranks, such as {_offer(options.schedule, pp, placement, sequences)}"
        )
    if placement.file is not None:
        return placement.file.microbatches
    per_rank = len(placement.ranks) // pp
    shares = {n: bubble_share(options.schedule, pp, per_rank, n) for n in fitting}
    return next((n for n in fitting if shares[n] <= max_bubble_share), min(fitting, key=lambda n: shares[n]))


def _ranks(pp: int, per_rank: int, *, v_shaped: bool) -> tuple[int, ...]:
    one_way = list(range(pp))
    if v_shaped:
        return tuple(one_way + one_way[::-1])
    return tuple(one_way * per_rank)


def _check_blocks(pp: int, count: int, blocks: Sequence[str], split: Sequence[str]) -> None:
    if count > len(blocks):
        raise LayoutError(
            f"there are {count} pipeline stages (pp {pp} x {count // pp} per rank), but only {len(blocks)} blocks; "
            "set a smaller pp or fewer stages per rank"
        )
    unknown = [name for name in split if name not in blocks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], blocks, n=3, cutoff=0.4) or list(blocks[1:4])
        raise LayoutError(
            f"pipeline.split: not the names of blocks: {', '.join(unknown)} (nearest to the first: {', '.join(near)})"
        )
    places = [blocks.index(name) for name in split]
    if any(later <= earlier for earlier, later in zip([0, *places], places, strict=False)):
        raise LayoutError(
            f"pipeline.split: must name blocks in the model's order, each once and without the first, {blocks[0]}, "
            f"but is {', '.join(split)}"
        )


def _check_microbatches(pp: int, placement: StagePlacement, options: PipelineOptions, microbatches: int) -> None:
    if _takes(options.schedule, pp, placement, microbatches):
        return
    rules = {
        "1F1B": f"at least as many as ranks, {pp}",
        "DualPipeV": f"at least as many as stages, {len(placement.ranks)}",
        **dict.fromkeys(_ROUNDS, f"a multiple of the number of rounds, which is microbatches // {pp}"),
    }
    rule = rules.get(options.schedule, f"{placement.file.microbatches}, as the file has" if placement.file else "")
    raise LayoutError(
        f"pipeline schedule {options.schedule} on {pp} ranks takes {rule}, but there are {microbatches} microbatches; "
        f"these numbers would fit: {_offer(options.schedule, pp, placement, microbatches)}"
    )


def _takes(schedule: str, pp: int, placement: StagePlacement, microbatches: int) -> bool:
    """Return whether torch's class of a schedule takes a number of microbatches."""
    if microbatches < 1:
        return False
    if placement.file is not None:
        return microbatches == placement.file.microbatches
    if schedule in _ROUNDS:
        return microbatches % max(1, microbatches // pp) == 0
    least = {"1F1B": pp, "DualPipeV": len(placement.ranks)}
    return microbatches >= least.get(schedule, 1)


def _offer(schedule: str, pp: int, placement: StagePlacement, near: int) -> list[int]:
    """Return the nearest numbers of microbatches that a schedule takes."""
    if placement.file is not None:
        return [placement.file.microbatches]
    fitting = [n for n in range(1, near + 4 * pp) if _takes(schedule, pp, placement, n)]
    return sorted(sorted(fitting, key=lambda n: abs(n - near))[:_OFFERED])
