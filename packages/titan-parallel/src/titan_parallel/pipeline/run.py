"""Pipeline parallelism: the blocks in stages, on ranks that hand the hidden state on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel.clip_grad import clip_grad_norm
from titan_parallel.options import ParallelOptions
from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.broadcast import raise_together, share
from titan_parallel.pipeline.dry_run import rehearse
from titan_parallel.pipeline.schedules import Stages, check_pipeline
from titan_parallel.pipeline.shape_inference import Boundaries
from titan_parallel.pipeline.stage import Stage
from titan_parallel.pipeline.tied_weights import TiedStages
from titan_parallel.pipeline.torch_schedule import BuiltSchedule, ScheduledStage
from titan_parallel.sequential import LossFunction, Microbatch, checked_loss, loss_context
from titan_parallel.tensor.styles import settle_gradients, to_full, whole


class PipelineRun:
    """Runs the stages of this rank together with those of the other ranks of the pipeline.

    Args:
        stages: Those of this rank, by their place among all stages.
        placed: Where all stages lie.
        mesh: From `build_mesh`.
        options: Schedule; whether blocks are compiled.
        ties: Weights that stages share.
        sharded_logits: Whether the model's logits are left split over the vocabulary.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        placed: Stages,
        mesh: DeviceMesh,
        options: ParallelOptions,
        ties: TiedStages,
        sharded_logits: bool,
    ) -> None:
        self.placed = placed
        self._stages = stages
        self._options = options
        self._ties = ties
        self._sharded_logits = sharded_logits
        self._group = mesh["pp"].get_group()
        self._boundaries = Boundaries(stages, mesh, placed.ranks[0])
        # Half of a compiled block's backward cannot be run alone; what is checkpointed would be computed twice.
        together = options.compile_blocks or options.activation_checkpointing != "none"
        self._halves = placed.splits_backward and not together
        self._rehearsed = False
        self._built: tuple[Hashable, BuiltSchedule] | None = None

    @property
    def parts(self) -> list[nn.Module]:
        """What of the model is on this rank."""
        return [stage.part for stage in self._stages.values()]

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, normaliser: float
    ) -> Tensor:
        """See `ParallelModel`; the loss is on the ranks with the last stage, zero on others."""
        check_pipeline(self._group.size(), self._options.pipeline, microbatches=len(microbatches))

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            return self._loss(output, microbatch, loss_function) / normaliser

        self._ties.begin()
        losses = self._run(microbatches, finish, trains=True)
        settle_gradients(p for stage in self._stages.values() for p in stage.parameters())
        self._ties.add_up()
        return self._sum(losses)

    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """See `ParallelModel`; the loss is on the ranks with the last stage, zero on others."""

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            return self._loss(output, microbatch, loss_function)

        return self._sum(self._run(microbatches, finish, trains=False))

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See `ParallelModel`."""
        outputs: list[Any] = []

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            outputs.append(whole(output))
            return torch.zeros(())

        self._run([Microbatch(args, None, kwargs)], finish, trains=False)
        return share(outputs[0] if outputs else None, self._group, self.placed.ranks[-1], self._device)

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """See `ParallelModel`."""
        return clip_grad_norm(parameters, max_norm, stages=self._group, copies=self._ties.counted_elsewhere())

    def _run(
        self, microbatches: Sequence[Microbatch], finish: Callable[[Any, Any], Tensor], *, trains: bool
    ) -> list[Tensor]:
        self._ties.follow()
        boundaries = self._boundaries.of(microbatches, self._device)
        for stage in self._stages.values():
            stage.finish = finish
        try:
            with loss_context(self._sharded_logits):
                if trains and not self._rehearsed:
                    self._rehearse(microbatches[0], boundaries[0])
                return self._schedule(len(microbatches), boundaries[0], trains).run(microbatches, boundaries)
        except BaseException:
            self._built = None  # left in the middle of a step
            raise
        finally:
            for stage in self._stages.values():
                stage.finish = None

    def _rehearse(self, microbatch: Microbatch, boundary: Boundary) -> None:
        problem: Exception | None = None
        try:
            for index, stage in self._stages.items():
                rehearse(stage, index, microbatch, boundary, halves=self._halves)
        except Exception as error:
            problem = error
        raise_together(problem, self._group)
        self._rehearsed = True

    def _loss(self, output: Any, microbatch: Microbatch, loss_function: LossFunction) -> Tensor:
        loss = checked_loss(loss_function(output if self._sharded_logits else whole(output), microbatch.target))
        return to_full(loss).float()

    def _sum(self, losses: Sequence[Tensor]) -> Tensor:
        zero = torch.zeros((), device=self._device)
        return torch.stack([zero, *(loss.detach() for loss in losses)]).sum()

    def _schedule(self, count: int, boundary: Boundary, trains: bool) -> BuiltSchedule:
        """Return the schedule, built anew if anything changed: stages' buffers are of one shape and one kind of use."""
        key = (count, trains, boundary.local, boundary.hidden.dtype)
        if self._built is None or self._built[0] != key:
            pipeline = self._options.pipeline
            last = len(self.placed.ranks) - 1
            stages = [
                ScheduledStage(
                    stage, index, last + 1, self._group, boundary, splits=self.placed.splits_backward and trains
                )
                for index, stage in self._stages.items()
            ]
            self._built = key, BuiltSchedule(pipeline.schedule, self.placed, stages, count, trains)
        return self._built[1]

    @property
    def _device(self) -> torch.device:
        return next(iter(self._stages.values())).flow.device
