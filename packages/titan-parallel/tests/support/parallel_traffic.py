"""Cases that count collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist

import parallel_heads
from parallel_cases import batch, build, plan, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import Degrees, Microbatch, ParallelModel, ParallelOptions, parallelize

KINDS = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
}


def collectives(degrees: Degrees, options: ParallelOptions, microbatches: int) -> tuple[dict[str, int], dict[str, int]]:
    """Count what a step's forward and backward send, and what clipping then sends."""
    return _collectives(parallelize(build(False), cpu_mesh(degrees), plan(False), options), microbatches)


def collectives_of_shared_heads() -> tuple[dict[str, int], dict[str, int]]:
    """Count those of ranks that share one key/value head."""
    world_size = dist.get_world_size()
    mesh = cpu_mesh(Degrees(tp=world_size))
    return _collectives(parallelize(parallel_heads.build(1), mesh, parallel_heads.plan(1)), 1)


def _collectives(model: ParallelModel, microbatches: int) -> tuple[dict[str, int], dict[str, int]]:
    from torch.distributed.tensor.debug import CommDebugMode  # imports numpy, which torch does not require

    tokens, labels = batch(0)
    step = [Microbatch((tokens,), labels)] * microbatches
    model._called.add("forward_backward")  # in the first call ranks also see whether they were asked for the same
    model._host_group = None  # what hosts exchange beside a step does not use the devices' network
    with CommDebugMode() as training:
        model.forward_backward(step, summed_loss, labels.numel())
    with CommDebugMode() as clipping:
        model.clip_grad_norm(1.0)
    return _by_kind(training), _by_kind(clipping)


def _by_kind(mode: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for op, count in mode.get_comm_counts().items():
        name = str(op).rsplit(".", 1)[-1].strip("_")
        counts[next(kind for start, kind in KINDS.items() if name.startswith(start))] += count
    return dict(counts)
