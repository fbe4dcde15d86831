"""Running a step through a pipeline: shape inference, a dry run in the first step, then torch's schedule.

The counterpart of `sequential.SequentialRun`; made by `build.make_stages`, called by `ParallelModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel.autocast import forget_casts
from titan_parallel.clip_grad import clip_grad_norm
from titan_parallel.options import ParallelOptions
from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.broadcast import broadcast_output
from titan_parallel.pipeline.dry_run import dry_run_stage
from titan_parallel.pipeline.schedules import StagePlacement, check_pipeline
from titan_parallel.pipeline.shape_inference import Boundaries
from titan_parallel.pipeline.stage import Stage
from titan_parallel.pipeline.tied_weights import TiedStages
from titan_parallel.pipeline.torch_schedule import BuiltSchedule, ScheduledStage
from titan_parallel.sequential import Microbatch, loss_context
from titan_parallel.step import LossFunction, Step, checked_loss
from titan_parallel.tensor.styles import full_output, settle_gradients, to_full


class PipelineRun:
    """Runs the stages of this rank together with those of the other ranks of the pipeline.

    Args:
        stages: The stages of this rank, by their index among all stages.
        placement: Which stages are on which rank.
        mesh: From `build_mesh`.
        options: Schedule; whether blocks are compiled or checkpointed.
        ties: Weights that stages share.
        sharded_logits: Whether the model's logits stay split over the vocabulary.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        placement: StagePlacement,
        mesh: DeviceMesh,
        options: ParallelOptions,
        ties: TiedStages,
        *,
        sharded_logits: bool,
    ) -> None:
        self.placement = placement
        self._stages = stages
        self._options = options
        self._ties = ties
        self._sharded_logits = sharded_logits
        self._group = mesh["pp"].get_group()
        self._boundaries = Boundaries(stages, mesh, placement.ranks[0])
        # Backward of a compiled block cannot run in halves; a checkpointed one would be recomputed for each half.
        together = options.compile_blocks or options.activation_checkpointing != "none"
        self._halves = placement.splits_backward and not together
        self._dry_run_done = False
        self._built: tuple[Hashable, BuiltSchedule] | None = None

    @property
    def parts(self) -> list[nn.Module]:
        """The parts of the model on this rank."""
        return [stage.part for stage in self._stages.values()]

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, num_target_tokens: float, step: Step
    ) -> Tensor:
        """See `ParallelModel`; the loss is on the ranks with the last stage, zero on others."""
        step.agree()
        check_pipeline(self._group.size(), self._options.pipeline, microbatches=len(microbatches))

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            return self._loss(output, microbatch, loss_function) / num_target_tokens

        self._ties.begin()
        losses = self._run(microbatches, finish, step, trains=True)
        settle_gradients(p for stage in self._stages.values() for p in stage.parameters())
        self._ties.add_up()
        return self._sum(losses)

    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction, step: Step) -> Tensor:
        """See `ParallelModel`; the loss is on the ranks with the last stage, zero on others."""

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            return self._loss(output, microbatch, loss_function)

        return self._sum(self._run(microbatches, finish, step, trains=False))

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: Step) -> Any:
        """See `ParallelModel`."""
        outputs: list[Any] = []

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            outputs.append(full_output(output))
            return torch.zeros(())

        self._run([Microbatch(args, None, kwargs)], finish, step, trains=False)
        return broadcast_output(outputs[0] if outputs else None, self._group, self.placement.ranks[-1], self._device)

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """See `ParallelModel`."""
        copies = self._ties.counted_elsewhere()
        return clip_grad_norm(parameters, max_norm, stages=self._group, copies=copies, device=self._device)

    def _run(
        self, microbatches: Sequence[Microbatch], finish: Callable[[Any, Any], Tensor], step: Step, *, trains: bool
    ) -> list[Tensor]:
        step.agree()
        forget_casts()
        self._ties.follow()
        for stage in self._stages.values():
            stage.finish = finish
        try:
            with loss_context(sharded_logits=self._sharded_logits):
                if trains and not self._dry_run_done:
                    boundaries = self._dry_run(microbatches, step)
                else:
                    boundaries = self._boundaries.of(microbatches, self._device)
                schedule = self._schedule(len(microbatches), boundaries[0], trains=trains)
                step.has_sent = True
                return schedule.run(microbatches, boundaries)
        except BaseException:
            self._built = None  # it is in the middle of a step
            raise
        finally:
            for stage in self._stages.values():
                stage.finish = None

    def _dry_run(self, microbatches: Sequence[Microbatch], step: Step) -> list[Boundary]:
        """Return what stages exchange. Exceptions are raised on all ranks, before anything is sent."""
        problem: Exception | None = None
        boundaries: list[Boundary] = []
        try:
            boundaries = self._boundaries.of(microbatches, self._device)
            with step.unguarded():
                for index, stage in self._stages.items():
                    dry_run_stage(stage, index, microbatches[0], boundaries[0], halves=self._halves)
        except Exception as error:
            problem = error
        step.raise_together(problem)
        self._dry_run_done = True
        return boundaries

    def _loss(self, output: Any, microbatch: Microbatch, loss_function: LossFunction) -> Tensor:
        loss = checked_loss(loss_function(output if self._sharded_logits else full_output(output), microbatch.target))
        return to_full(loss).float()

    def _sum(self, losses: Sequence[Tensor]) -> Tensor:
        zero = torch.zeros((), device=self._device)
        return torch.stack([zero, *(loss.detach() for loss in losses)]).sum()

    def _schedule(self, count: int, boundary: Boundary, *, trains: bool) -> BuiltSchedule:
        """Return the schedule, rebuilt if number, shape or use of microbatches changed: stages' buffers are fixed."""
        key = (count, trains, boundary.local, boundary.hidden.dtype)
        if self._built is None or self._built[0] != key:
            pipeline = self._options.pipeline
            last = len(self.placement.ranks) - 1
            stages = [
                ScheduledStage(
                    stage, index, last + 1, self._group, boundary, splits=self.placement.splits_backward and trains
                )
                for index, stage in self._stages.items()
            ]
            self._built = key, BuiltSchedule(pipeline.schedule, self.placement, stages, count, trains=trains)
        return self._built[1]

    @property
    def _device(self) -> torch.device:
        return next(iter(self._stages.values())).flow.device
