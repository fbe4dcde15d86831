"""Running the microbatches of a step one after the other, for layouts without a pipeline.

`parallelize` makes a `SequentialRun` or, with pp above 1, a `PipelineRun`; `ParallelModel` calls either as a `Run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import loss_parallel

from titan_parallel.autocast import forget_casts
from titan_parallel.clip_grad import clip_grad_norm
from titan_parallel.fsdp import set_last_microbatch
from titan_parallel.step import LossFunction, Step, checked_loss
from titan_parallel.tensor.styles import full_output, to_full


@dataclass(frozen=True)
class Microbatch:
    """The arguments of one forward and its loss.

    Attributes:
        args: Positional arguments of the model.
        target: Second argument of the loss function; the first is the model's output.
        kwargs: Keyword arguments of the model.
    """

    args: tuple[Any, ...]
    target: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Run(Protocol):
    """Interface by which `ParallelModel` runs its parts; see its methods of the same names."""

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, num_target_tokens: float, step: Step
    ) -> Tensor:
        """Accumulate the gradients of one step; return this rank's part of the loss."""
        ...

    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction, step: Step) -> Tensor:
        """Return this rank's part of the summed loss."""
        ...

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: Step) -> Any:
        """Return the full output, on every rank."""
        ...

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip by the norm over all ranks and return the norm."""
        ...


def loss_context(*, sharded_logits: bool) -> AbstractContextManager[None]:
    """Return the context to compute the loss in; `sharded_logits`: logits are split over the vocabulary."""
    return loss_parallel() if sharded_logits else nullcontext()


@dataclass(frozen=True)
class SequentialRun:
    """Runs a model that is not split into stages.

    Attributes:
        model: The model.
        sharded_logits: Whether its logits stay split over the vocabulary.
        reduce_every: Whether gradients are summed over the shards after each microbatch.
    """

    model: nn.Module
    sharded_logits: bool
    reduce_every: bool

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, num_target_tokens: float, step: Step
    ) -> Tensor:
        """See `Run`."""
        parts = []
        for i, microbatch in enumerate(microbatches):
            is_last = i == len(microbatches) - 1
            set_last_microbatch(self.model, is_last=is_last, reduce_every=self.reduce_every)
            with loss_context(sharded_logits=self.sharded_logits):
                loss = self._loss(microbatch, loss_function, step) / num_target_tokens
                if loss.requires_grad:  # not if all parameters are frozen
                    loss.backward()  # type: ignore[no-untyped-call]
            parts.append(to_full(loss.detach()))
        return torch.stack(parts).sum()

    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction, step: Step) -> Tensor:
        """See `Run`."""
        with loss_context(sharded_logits=self.sharded_logits):
            return torch.stack([to_full(self._loss(m, loss_function, step)) for m in microbatches]).sum()

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: Step) -> Any:
        """See `Run`."""
        output = self._forward(Microbatch(args, None, kwargs), step)
        return full_output(output)

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """See `Run`."""
        return clip_grad_norm(parameters, max_norm)

    def _loss(self, microbatch: Microbatch, loss_function: LossFunction, step: Step) -> Tensor:
        output = self._forward(microbatch, step)
        return checked_loss(loss_function(output if self.sharded_logits else full_output(output), microbatch.target))

    def _forward(self, microbatch: Microbatch, step: Step) -> Any:
        step.has_sent = True
        forget_casts()
        output = self.model(*microbatch.args, **microbatch.kwargs)
        step.agree()
        return output
