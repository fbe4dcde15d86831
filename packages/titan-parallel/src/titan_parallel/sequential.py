"""How a model that is whole on each rank runs the microbatches of a step: one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import loss_parallel

from titan_parallel.clip_grad import clip_grad_norm
from titan_parallel.fsdp import set_last_microbatch
from titan_parallel.tensor.styles import to_full, whole

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Microbatch:
    """What one forward and its loss need.

    Attributes:
        args: Positional arguments of the model.
        target: Second argument of the loss function, after the model's output.
        kwargs: Keyword arguments of the model.
    """

    args: tuple[Any, ...]
    target: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Run(Protocol):
    """What `ParallelModel` runs its parts through; see the methods of the same names there."""

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, normaliser: float
    ) -> Tensor:
        """Add the gradients of one step; return this rank's part of the loss."""
        ...

    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """Return this rank's part of the summed loss."""
        ...

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the whole output, on every rank."""
        ...

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip by the norm over all ranks and return it."""
        ...


def loss_context(sharded_logits: bool) -> AbstractContextManager[None]:
    """Return the context in which the loss of logits that are split over the vocabulary is taken."""
    return loss_parallel() if sharded_logits else nullcontext()


def checked_loss(loss: Tensor) -> Tensor:
    """Return what a loss function returned.

    Raises:
        ValueError: If it is no single number.
    """
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return loss
    what = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise ValueError(f"the loss function has to return the sum over what it scores, a scalar, but returned {what}")


@dataclass(frozen=True)
class SequentialRun:
    """Runs a whole model.

    Attributes:
        model: The model.
        sharded_logits: Whether its logits are left split over the vocabulary.
        reduce_every: Whether gradients are summed over the shards after each microbatch.
    """

    model: nn.Module
    sharded_logits: bool
    reduce_every: bool

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, normaliser: float
    ) -> Tensor:
        """See `Run`."""
        parts = []
        for i, microbatch in enumerate(microbatches):
            set_last_microbatch(self.model, i == len(microbatches) - 1, reduce_every=self.reduce_every)
            with loss_context(self.sharded_logits):
                loss = self._loss(microbatch, loss_function) / normaliser
                loss.backward()  # type: ignore[no-untyped-call]
            parts.append(to_full(loss.detach()))
        return torch.stack(parts).sum()

    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """See `Run`."""
        with loss_context(self.sharded_logits):
            return torch.stack([to_full(self._loss(m, loss_function)) for m in microbatches]).sum()

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See `Run`."""
        return whole(self.model(*args, **kwargs))

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """See `Run`."""
        return clip_grad_norm(parameters, max_norm)

    def _loss(self, microbatch: Microbatch, loss_function: LossFunction) -> Tensor:
        output = self.model(*microbatch.args, **microbatch.kwargs)
        return checked_loss(loss_function(output if self.sharded_logits else whole(output), microbatch.target))
