"""The adapter to torch's pipeline schedules: stages of static shapes, and the schedule that runs them.

Stages are called without the user's arguments, because torch would chunk these along dim 0, keep them with the
activations and validate them against the first microbatch. Instead, each call names its microbatch by index.

`PipelineRun` builds a `BuiltSchedule`. Overridden methods of `PipelineStage` are public in torch 2.11 to 2.15; private
ones are in `_torch_compat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from titan_parallel._torch_compat import NoSelfGreeting, csv_schedule_class, load_csv_schedule, reorder_schedule
from titan_parallel.autocast import forget_casts
from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.schedules import StagePlacement
from titan_parallel.pipeline.stage import Stage
from titan_parallel.pipeline.stage_modules import GraphSplit
from titan_parallel.sequential import Microbatch


class ScheduledStage(NoSelfGreeting, PipelineStage):
    """A stage for torch's schedules.

    Args:
        stage: The stage.
        index: Its index among all stages.
        count: Number of all stages.
        group: The ranks of the pipeline.
        boundary: What stages exchange.
        splits: Whether the schedule computes gradients of inputs and of weights separately. If the stage cannot, both
            are computed at the time of the former.

    Attributes:
        microbatches: The microbatches of the step.
        boundaries: What stages exchange for each of them.
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
            dw_builder=_no_weight_gradients if splits and not stage.splits_backward else None,
        )
        self.stage = stage
        stage.flow.splits_graph = bool(splits and stage.splits_backward and stage.is_last)
        self.microbatches: Sequence[Microbatch] = ()
        self.boundaries: Sequence[Boundary] = ()
        self._graph_splits: dict[int, GraphSplit] = {}
        self._graph_split: GraphSplit | None = None  # of the microbatch whose backward runs

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the microbatch with this index."""
        flow = self.stage.flow
        self.stage.microbatch = self.microbatches[fwd_chunk_id]
        flow.boundary = self.boundaries[fwd_chunk_id]
        forget_casts()
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if flow.graph_split is not None:
            self._graph_splits[fwd_chunk_id], flow.graph_split = flow.graph_split, None
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute all gradients of the microbatch with this index, or those of the input only."""
        self._graph_split = self._graph_splits.pop(bwd_chunk_id, None)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False):  # type: ignore[no-untyped-def]  # noqa: FBT001, FBT002
        """Run a backward. If the graph is split, the part behind the last block runs first, in one piece."""
        split, self._graph_split = self._graph_split, None
        outputs = bwd_kwargs["stage_output"]
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        if backward_type != "weight" and not any(getattr(x, "requires_grad", True) for x in outputs if x is not None):
            return (None,) * len(bwd_kwargs["input_values"]), []  # all parameters involved are frozen
        if split is None:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        loss = bwd_kwargs["stage_output"]
        ending = {
            "stage_output": loss[0] if isinstance(loss, tuple) else loss,
            "output_grads": None,
            "input_values": [split.leaf],
        }
        gradients, _ = super().backward_maybe_with_nosync("full", ending)
        blocks = {**bwd_kwargs, "stage_output": (split.output,), "output_grads": gradients}
        return super().backward_maybe_with_nosync(backward_type, blocks, last_backward)

    # Between two stages on one rank torch passes gradients on even in evaluation, where there are none.

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return the gradient for the previous stage on this rank."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradient from the next stage on this rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce the gradients of the step over data-parallel ranks."""
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)


class BuiltSchedule:
    """A schedule for a fixed number of microbatches of one shape.

    Args:
        name: One of `SCHEDULES`, or the path of a CSV file.
        placement: Which stages are on which rank.
        stages: The stages of this rank.
        microbatches: Number of microbatches of a step.
        trains: Whether there is a backward.
    """

    def __init__(
        self, name: str, placement: StagePlacement, stages: Sequence[ScheduledStage], microbatches: int, *, trains: bool
    ) -> None:
        self._stages = stages
        self._count = microbatches
        self._trains = trains
        if not trains:  # a schedule with the same placement that takes any number of microbatches
            single = "GPipe" if len(stages) == 1 else "LoopedBFS"
            name = "ZBVZeroBubble" if placement.v_shaped else single
        file = name if placement.file is not None and trains else None
        kind: Any = csv_schedule_class() if file is not None else get_schedule_class(name)
        alone = name in ("GPipe", "1F1B")
        # The last stage computes the loss itself, since torch requires stages to return tensors; `loss_fn` passes it.
        self._schedule = kind(
            stages[0] if alone else list(stages), n_microbatches=microbatches, loss_fn=_unchanged, scale_grads=False
        )
        if file is not None:
            load_csv_schedule(self._schedule, file)
        if any(action.sub_actions for row in self._order() for action in row):
            # torch combines a forward and a backward into one action, for runtimes that overlap them, and sends both
            # results after both. As separate actions each result is sent as soon as it is computed.
            order = [[one for action in row for one in action.sub_actions or (action,)] for row in self._order()]
            reorder_schedule(self._schedule, dict(enumerate(order)))

    def _order(self) -> list[list[Any]]:
        """Return the actions of each rank in torch's schedule; empty for schedules without such a table."""
        order = getattr(self._schedule, "pipeline_order", {})
        return [[action for action in order[rank] if action is not None] for rank in sorted(order)]

    def run(self, microbatches: Sequence[Microbatch], boundaries: Sequence[Boundary]) -> list[Tensor]:
        """Run a step; return the losses of its microbatches in order, on the rank with the last stage."""
        losses: list[Tensor] = []
        target = torch.arange(self._count)  # placeholder that the schedule chunks into microbatches
        for stage in self._stages:
            stage.microbatches, stage.boundaries = microbatches, boundaries
        try:
            run = self._schedule.step if self._trains else self._schedule.eval
            run(target=target, losses=losses, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, Exception):  # torch wraps what a stage's forward raises
                raise error.__cause__ from None
            raise
        finally:
            for stage in self._stages:
                stage.microbatches, stage.boundaries = (), ()
        for stage in self._stages:
            stage.clear_runtime_states()
        return losses


def _unchanged(loss: Tensor, target: Tensor) -> Tensor:
    return loss


def _no_weight_gradients() -> Any:
    """Return a second half of backward that does nothing: the first half has computed all gradients."""
    return lambda: None
