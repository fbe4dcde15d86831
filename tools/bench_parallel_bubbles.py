"""How long ranks of a pipeline wait, measured, against theory.

The blocks compute nothing but sleep: as long for a forward as for the gradients of inputs and for those of weights. So
each process is a device of its own, however few cores there are, and what is measured is the schedule with all that
it costs beside the work: Python, autograd, and sending over gloo.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench_parallel_work import Settings, in_group
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelOptions,
    ParallelPlan,
    PipelineOptions,
    bubble_share,
    build_mesh,
    parallelize,
)

RANKS = 4
CASES = [
    ("GPipe", 1, 4),
    ("GPipe", 1, 8),
    ("1F1B", 1, 4),
    ("1F1B", 1, 8),
    ("1F1B", 1, 16),
    ("Interleaved1F1B", 2, 8),
    ("LoopedBFS", 2, 8),
    ("InterleavedZeroBubble", 2, 8),
    ("ZBVZeroBubble", 2, 8),
    ("DualPipeV", 2, 8),
]  # schedule, stages on a rank, microbatches


class _Sleep(torch.autograd.Function):
    """The identity, which takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return grad, None, None


class Sleeper(nn.Module):
    """A block that sleeps in its forward, for the gradient of its input, and for that of its weight."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times the weight."""
        x = _Sleep.apply(x, self.seconds, self.seconds)
        return F.linear(x, _Sleep.apply(self.weight, 0.0, self.seconds))


class Sleepers(nn.Module):
    """Blocks one after the other."""

    def __init__(self, count: int, seconds: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Sleeper(seconds) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last block makes of `x`."""
        for block in self.blocks:
            x = block(x)
        return x


def bubble_line(case: tuple[str, int, int], settings: Settings) -> str:
    """Return the row of a table about one schedule."""
    schedule, per_rank, microbatches = case
    seconds = 0.002 if settings.tiny else 0.1
    walls = sorted(in_group(RANKS, _walls, *case, seconds, settings.rounds))
    theory = bubble_share(schedule, RANKS, per_rank, microbatches)
    work = 3 * per_rank * microbatches * seconds
    shares = [1 - work / wall for wall in walls]
    wall = statistics.median(walls)
    return (
        f"| {schedule} | {RANKS} x {per_rank} | {microbatches} | {theory:.3f} | **{1 - work / wall:.3f}** "
        f"({shares[0]:.3f} to {shares[-1]:.3f}) | {wall / (work / (1 - theory)):.3f} |"
    )


def _walls(schedule: str, per_rank: int, microbatches: int, seconds: float, rounds: int) -> list[float]:
    """Return the seconds of some steps, each begun together, to the last rank's end."""
    torch.set_num_threads(1)
    plan: ParallelPlan = {"blocks": ["blocks.*"]}
    pipeline = PipelineOptions(schedule=schedule, stages_per_rank=per_rank)
    mesh = build_mesh(Degrees(pp=RANKS), "cpu")
    # The last block's input gradient is wanted as the others' are; so is the first one's, who sleeps for it as well.
    model = parallelize(Sleepers(RANKS * per_rank, seconds), mesh, plan, ParallelOptions(pipeline=pipeline))
    step = [Microbatch((torch.ones(2, 4, requires_grad=True),), torch.ones(2, 4)) for _ in range(microbatches)]
    walls = []
    for _ in range(1 + rounds):  # the first one warms up
        dist.barrier()
        started = time.perf_counter()
        model.forward_backward(step, F.mse_loss, microbatches)
        longest = torch.tensor(time.perf_counter() - started)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        walls.append(longest.item())
    return walls[1:]
