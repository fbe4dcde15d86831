"""One forward of each stage alone, before anything is sent, so that errors are found and raised on all ranks.

If a stage computed something from the stand-ins of other stages' modules, the result would be wrong without an error.
The autograd graph of the dry run shows whether it does, and whether backward can run in two halves.

`PipelineRun` calls `dry_run_stage` in the first training step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan_parallel.errors import LayoutError
from titan_parallel.fsdp import reshard
from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.split_backward import is_splittable, nodes_below
from titan_parallel.pipeline.stage import Arguments, Stage


def dry_run_stage(stage: Stage, index: int, microbatch: Arguments, boundary: Boundary, *, halves: bool) -> None:
    """Run a stage's forward on a microbatch and a hidden state of zeros, and inspect the graph.

    Args:
        stage: The stage; its `splits_backward` is set.
        index: Its index among all stages.
        microbatch: The arguments of the model.
        boundary: What stages exchange.
        halves: Whether to run its backward in two halves, if possible.

    Raises:
        LayoutError: If its result depends on other stages other than through the hidden state.
    """
    flow = stage.flow
    modes = [(module, module.training) for module in stage.modules()]
    stage.eval()  # no dropout, no running statistics
    stage.microbatch, flow.boundary = microbatch, boundary
    flow.splits_graph, flow.stand_ins = halves and stage.is_last, []
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
        flow.splits_graph, flow.stand_ins, flow.end_hidden, flow.graph_split = False, None, None, None
        for module, training in modes:
            module.training = training
        reshard(stage)


def _check_stand_ins(stage: Stage, result: Tensor) -> None:
    flow = stage.flow
    own = [x for x in (result, flow.end_hidden) if x is not None]
    reached = {id(getattr(node, "variable", None)) for x in own for node in nodes_below(x)}
    used = sorted({name for stand_in, name in flow.stand_ins or () if id(stand_in) in reached})
    if used:
        raise LayoutError(
            f"pipeline stages exchange only the hidden state, but a later stage also needs the output of "
            f"{', '.join(used)}; set pp=1, or compute it inside each block"
        )


def _check_end(stage: Stage, result: Tensor) -> None:
    """Check that the loss depends on the blocks of the last stage only through their output."""
    end = stage.flow.end_hidden
    if end is not None and not set(nodes_below(end)).isdisjoint(nodes_below(result, without=end.grad_fn)):
        raise LayoutError(
            "pipeline stages exchange only the hidden state, but the loss depends on the blocks in another way too, "
            "such as by a loss that blocks keep in an attribute, which would be missing on other stages; set pp=1"
        )


def _splits(stage: Stage, received: Tensor | None, result: Tensor) -> bool:
    if received is None or not received.requires_grad:
        return True  # the first stage has no gradient of an input: all of it is the second half
    split = stage.flow.graph_split
    if stage.is_last and split is None:
        return False
    return is_splittable(split.output if split else result, received)
