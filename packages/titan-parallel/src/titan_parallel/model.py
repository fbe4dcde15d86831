"""`ParallelModel`: one object through which a training loop drives a model, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from titan_parallel.clipping import clip_grad_norm
from titan_parallel.plan import clean_name
from titan_parallel.sharding import set_last_microbatch
from titan_parallel.tensor_parallel import to_full

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


class ParallelModel:
    """A parallelized model. Made by `parallelize`.

    Attributes:
        module: The model as it now runs on this rank.
        mesh: The mesh it is laid out on.
    """

    def __init__(
        self, module: nn.Module, mesh: DeviceMesh, tied: Sequence[tuple[str, str]], sharded_logits: bool
    ) -> None:
        self.module = module
        self.mesh = mesh
        self._tied = tied
        self._sharded_logits = sharded_logits

    def materialize(self, device: torch.device | str) -> None:
        """Allocate the parameters and buffers of a model built on meta, uninitialised, on `device`."""
        self.module.to_empty(device=torch.device(device))
        tie_weights(self.module, self._tied)  # `to_empty` makes two tensors of a tied one

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, normaliser: float
    ) -> Tensor:
        """Add the gradients of one step's loss: the sum over all microbatches of all ranks, over `normaliser`.

        Args:
            microbatches: This rank's share of the global batch, with the same number of microbatches on each rank.
            loss_function: Maps (output, target) to the *summed* loss, a scalar.
            normaliser: What to divide by, equal on all ranks: for the mean over tokens, the number of scored tokens
                of the global batch.

        Returns:
            This rank's part of the loss, detached: the parts of all ranks of the data axis add up to the loss.
        """
        total: Tensor | None = None
        for i, microbatch in enumerate(microbatches):
            set_last_microbatch(self.module, i == len(microbatches) - 1)
            with self._loss_context():
                output = self.module(*microbatch.args, **microbatch.kwargs)
                loss = loss_function(output, microbatch.target) / normaliser
                del output
                loss.backward()  # type: ignore[no-untyped-call]
            part = to_full(loss.detach())
            total = part if total is None else total + part
        assert total is not None, "a step needs at least one microbatch"
        self._settle_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """Return this rank's summed loss over `microbatches`, without gradients, in evaluation mode."""
        was_training = self.module.training
        self.module.eval()
        with self._loss_context():
            losses = [to_full(loss_function(self.module(*m.args, **m.kwargs), m.target)) for m in microbatches]
        self.module.train(was_training)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the model's output for the given arguments as a whole tensor on every rank, in evaluation mode.

        All ranks call it together, with equal arguments.
        """
        was_training = self.module.training
        self.module.eval()
        output: Tensor = to_full(self.module(*args, **kwargs))
        self.module.train(was_training)
        return output

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Clip the gradients by their global norm and return it; see `titan_parallel.clip_grad_norm`."""
        return clip_grad_norm(self.parameters(), max_norm)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the plain model, parameter); a tied weight comes once, under its owner's name."""
        for name, parameter in self.module.named_parameters():
            yield clean_name(name), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter once."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and persistent buffers by their names in the plain model; a tied weight comes once."""
        aliases = {alias for alias, _ in self._tied}
        state = {clean_name(name): value for name, value in self.module.state_dict().items()}
        return {name: value for name, value in state.items() if name not in aliases}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state`, of the form that `state_dict` returns and of the same sharding, into the model.

        Raises:
            KeyError: If names are missing or unexpected; nothing is copied then.
        """
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise KeyError(f"the state does not fit the model: missing {missing}, unexpected {unexpected}")
        for name, value in own.items():
            if value is not state[name]:
                value.copy_(state[name])

    def _loss_context(self) -> AbstractContextManager[None]:
        return loss_parallel() if self._sharded_logits else nullcontext()

    def _settle_gradients(self) -> None:
        # Parameters that tensor-parallel ranks share gather a part of their gradient on each: sum the parts here, once,
        # so that nobody after this meets a gradient that is laid out otherwise than its parameter.
        for parameter in self.parameters():
            gradient = parameter.grad
            if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
                continue
            if gradient.placements != parameter.placements:
                parameter.grad = gradient.redistribute(placements=parameter.placements)


def tie_weights(model: nn.Module, tied: Sequence[tuple[str, str]]) -> None:
    """Make each alias the same parameter object as its owner again, after a transform replaced one of them."""
    for alias, owner in tied:
        owner_module, owner_key = owner.rsplit(".", 1)
        alias_module, alias_key = alias.rsplit(".", 1)
        parameter = getattr(model.get_submodule(owner_module), owner_key)
        model.get_submodule(alias_module).register_parameter(alias_key, parameter)
