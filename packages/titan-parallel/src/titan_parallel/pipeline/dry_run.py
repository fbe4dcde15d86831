"""A first forward of each stage by itself, before any is sent: errors and what must not be are found on all ranks.

What a stage computes from stand-ins of other stages' modules would be wrong, and nobody would notice. The graph tells
whether it does; and whether its backward can be run in two halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan_parallel.errors import LayoutError
from titan_parallel.fsdp import reshard
from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.split_backward import is_splittable, nodes_below
from titan_parallel.pipeline.stage import Arguments, Stage


def rehearse(stage: Stage, index: int, microbatch: Arguments, boundary: Boundary, *, halves: bool) -> None:
    """Run a stage's forward on a microbatch and a hidden state of zeros, and look at the graph.

    Args:
        stage: Its `splits_backward` is set.
        index: Its place among all stages.
        microbatch: What to run on.
        boundary: What passes between stages.
        halves: Whether to run its backward in two halves, if that can be.

    Raises:
        LayoutError: If what it computes depends on other stages other than by the hidden state.
    """
    flow = stage.flow
    modes = [(module, module.training) for module in stage.modules()]
    stage.eval()  # so that nothing is counted, drawn or averaged
    stage.microbatch, flow.boundary = microbatch, boundary
    flow.parts, flow.stand_ins = halves and stage.is_last, []
    devices = [flow.device] if flow.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            received = None
            if index:
                shape, dtype = boundary.local, boundary.hidden.dtype
                received = torch.zeros(shape, dtype=dtype, device=flow.device, requires_grad=dtype.is_floating_point)
            result = stage(received)
        _check_stand_ins(stage, result)
        _check_end(stage, result)
        stage.splits_backward = halves and _splits(stage, received, result)
    finally:
        flow.parts, flow.stand_ins, flow.ended, flow.parting = False, None, None, None
        for module, training in modes:
            module.training = training
        reshard(stage)


def _check_stand_ins(stage: Stage, result: Tensor) -> None:
    flow = stage.flow
    own = [x for x in (result, flow.ended) if x is not None]
    reached = {id(getattr(node, "variable", None)) for x in own for node in nodes_below(x)}
    used = sorted({name for stand_in, name in flow.stand_ins or () if id(stand_in) in reached})
    if used:
        raise LayoutError(
            f"pipeline stages exchange the hidden state alone, but what {', '.join(used)} returns, on another stage, "
            "is needed beside it: take pp 1, or compute it inside each block"
        )


def _check_end(stage: Stage, result: Tensor) -> None:
    """Check that the last stage computes the loss from what its blocks hand on, and from nothing else of them."""
    ended = stage.flow.ended
    if ended is not None and not set(nodes_below(ended)).isdisjoint(nodes_below(result, without=ended.grad_fn)):
        raise LayoutError(
            "pipeline stages exchange the hidden state alone, but the loss depends on the blocks in another way too, "
            "as by a loss of their own that is kept in an attribute; of the blocks of other stages that part would be "
            "missing: take pp 1"
        )


def _splits(stage: Stage, received: Tensor | None, result: Tensor) -> bool:
    if received is None or not received.requires_grad:
        return True  # the first stage runs it all with the second half
    parting = stage.flow.parting
    if stage.is_last and parting is None:
        return False
    return is_splittable(parting.left if parting else result, received)
