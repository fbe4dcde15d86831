"""The seam to torch's pipeline schedules: stages of static shapes, and the schedule that runs them.

Every stage is called without arguments of the user's: torch would cut these along their first dim, keep them with the
activations and check them against those of the first microbatch. Which microbatch is meant comes with each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, get_schedule_class

from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.schedules import Stages
from titan_parallel.pipeline.stage import Stage
from titan_parallel.pipeline.stage_modules import Parting
from titan_parallel.sequential import Microbatch


class ScheduledStage(PipelineStage):
    """A stage as a schedule knows it.

    Args:
        stage: What it computes.
        index: Its place among all stages.
        count: Number of all stages.
        group: The ranks of the pipeline.
        boundary: What passes between stages.
        splits: Whether the schedule has gradients of inputs and of weights apart. Where the stage cannot have them
            apart they are computed together, at the place of the former.

    Attributes:
        microbatches: Of the step.
        boundaries: For each of them.
    """

    def __init__(
        self, stage: Stage, index: int, count: int, group: ProcessGroup, boundary: Boundary, *, splits: bool
    ) -> None:
        hidden = torch.empty(boundary.local, dtype=boundary.hidden.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        super().__init__(
            stage,
            index,
            count,
            stage.flow.device,
            input_args=(hidden,) if index else (),
            output_args=(hidden,) if index < count - 1 else (loss,),
            group=group,
            dw_builder=_nothing_left if splits and not stage.splits_backward else None,
        )
        self.stage = stage
        stage.flow.parts = bool(splits and stage.splits_backward and stage.is_last)
        self.microbatches: Sequence[Microbatch] = ()
        self.boundaries: Sequence[Boundary] = ()
        self._partings: dict[int, Parting] = {}
        self._parting: Parting | None = None  # of the microbatch whose backward runs

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute the microbatch of this number."""
        flow = self.stage.flow
        self.stage.microbatch = self.microbatches[fwd_chunk_id]
        flow.boundary = self.boundaries[fwd_chunk_id]
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if flow.parting is not None:
            self._partings[fwd_chunk_id], flow.parting = flow.parting, None
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute the gradients of the microbatch of this number, or those of the input alone."""
        self._parting = self._partings.pop(bwd_chunk_id, None)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False):  # type: ignore[no-untyped-def]
        """Run a backward; that of what follows the last block first, and in one piece, where the graph is parted."""
        parting, self._parting = self._parting, None
        outputs = bwd_kwargs["stage_output"]
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        if backward_type != "weight" and not any(getattr(x, "requires_grad", True) for x in outputs if x is not None):
            return (None,) * len(bwd_kwargs["input_values"]), []  # all that it computes with is frozen
        if parting is None:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        loss = bwd_kwargs["stage_output"]
        ending = {
            "stage_output": loss[0] if isinstance(loss, tuple) else loss,
            "output_grads": None,
            "input_values": [parting.arrived],
        }
        gradients, _ = super().backward_maybe_with_nosync("full", ending)
        blocks = {**bwd_kwargs, "stage_output": (parting.left,), "output_grads": gradients}
        return super().backward_maybe_with_nosync(backward_type, blocks, last_backward)

    # Of stages that meet on one rank, torch hands gradients on even where there are none, in evaluation.

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return the gradient for the stage before on this rank."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradient of the stage after on this rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        """Leave this rank itself out of the neighbours that torch 2.11 greets first; gloo sends nothing to itself."""
        greet: Any = super()
        return [one for one in greet._get_init_p2p_neighbors_ops() if one.group_peer != self.group_rank]

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce the gradients of the step over data ranks."""
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)


class BuiltSchedule:
    """A schedule for a number of microbatches of one shape.

    Args:
        name: One of `SCHEDULES`, or the path of a file.
        placed: Where the stages lie.
        stages: Those on this rank.
        microbatches: Of a step.
        trains: Whether there will be a backward.
    """

    def __init__(
        self, name: str, placed: Stages, stages: Sequence[ScheduledStage], microbatches: int, trains: bool
    ) -> None:
        self._stages = stages
        self._count = microbatches
        self._trains = trains
        if not trains:  # one that takes any number of microbatches, and places stages alike
            single = "GPipe" if len(stages) == 1 else "LoopedBFS"
            name = "ZBVZeroBubble" if placed.v_shaped else single
        file = name if placed.file is not None and trains else None
        kind: Any = _PipelineScheduleRuntime if file is not None else get_schedule_class(name)
        alone = name in ("GPipe", "1F1B")
        # The last stage computes the loss itself: torch wants tensors of what a stage returns.
        self._schedule = kind(
            stages[0] if alone else list(stages), n_microbatches=microbatches, loss_fn=_as_it_is, scale_grads=False
        )
        if file is not None:
            self._schedule._load_csv(file)
        if any(action.sub_actions for row in self._order() for action in row):
            # Of a forward and a backward that torch has as one action, for those who can run both at once, it would
            # send both results after both. One after the other, each goes as soon as it is there.
            order = [[one for action in row for one in action.sub_actions or (action,)] for row in self._order()]
            self._schedule._prepare_schedule_with_comms(dict(enumerate(order)))

    def _order(self) -> list[list[Any]]:
        """Return what torch has each rank compute, in order; nothing where it has no such table."""
        order = getattr(self._schedule, "pipeline_order", {})
        return [[action for action in order[rank] if action is not None] for rank in sorted(order)]

    def run(self, microbatches: Sequence[Microbatch], boundaries: Sequence[Boundary]) -> list[Tensor]:
        """Run a step; return the losses of its microbatches, on the rank with the last stage, in their order."""
        losses: list[Tensor] = []
        target = torch.arange(self._count)  # what the schedule cuts into microbatches
        for stage in self._stages:
            stage.microbatches, stage.boundaries = microbatches, boundaries
        try:
            run = self._schedule.step if self._trains else self._schedule.eval
            run(target=target, losses=losses, return_outputs=False)
        finally:
            for stage in self._stages:
                stage.microbatches, stage.boundaries = (), ()
        for stage in self._stages:
            stage.clear_runtime_states()
        return losses


def _as_it_is(loss: Tensor, target: Tensor) -> Tensor:
    return loss


def _nothing_left() -> Any:
    return lambda: None
