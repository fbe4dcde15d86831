"""`ParallelModel`: one object through which a training loop drives a model, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel

from titan_parallel.clipping import clip_grad_norm
from titan_parallel.context_inputs import SequenceCut
from titan_parallel.describe import Layout, describe
from titan_parallel.float8 import prepare_weights
from titan_parallel.mesh import MESH_DIMS
from titan_parallel.plan import clean_name
from titan_parallel.sharding import reshard, set_last_microbatch
from titan_parallel.tensor_parallel import settle_gradients, to_full, whole
from titan_parallel.tying import tie_weights

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
        parts: What of the model is on this rank: all of it in one part or, under pipeline parallelism, its stages.
        mesh: The mesh it is laid out on.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        mesh: DeviceMesh,
        tied: Sequence[tuple[str, str]],
        sharded_logits: bool,
        layout: Layout,
        cut: SequenceCut | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.mesh = mesh
        self._tied = tied
        self._sharded_logits = sharded_logits
        self._layout = layout
        self._cut = cut

    def materialize(self, device: torch.device | str) -> None:
        """Allocate the parameters and buffers of a model built on meta, uninitialised.

        Args:
            device: Where they lie; parameters that `cpu_offload` keeps in host memory lie there.
        """
        for part in self.parts:
            part.to_empty(device=torch.device("cpu" if self._layout.options.cpu_offload else device))
            for module in part.modules() if self._layout.options.cpu_offload else ():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
            tie_weights(part, self._tied)  # `to_empty` makes two tensors of a tied one

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, normaliser: float
    ) -> Tensor:
        """Add the gradients of one step's loss: the sum over all microbatches of all ranks, over `normaliser`.

        Args:
            microbatches: This rank's share of the global batch, with the same number of microbatches on each rank;
                whole sequences, of which context parallelism takes this rank's part.
            loss_function: Maps (output, target) to the *summed* loss, a scalar. The output is what the model returns,
                its tensors whole, but for logits that the plan leaves split over the vocabulary: on these,
                `torch.nn.functional.cross_entropy` with plain targets works as always.
            normaliser: What to divide by, equal on all ranks: for the mean over tokens, the number of scored tokens
                of the global batch.

        Returns:
            This rank's part of the loss, detached; `sum_parts` adds up those of all ranks.

        Raises:
            ValueError: If there is no microbatch, or context parallelism cannot cut its sequences.
        """
        _check_any(microbatches)
        self._prepare_weights()
        parts = []
        for i, microbatch in enumerate(microbatches):
            is_last = i == len(microbatches) - 1
            set_last_microbatch(self.parts[0], is_last, reduce_every=self._layout.options.reduce_every_microbatch)
            with self._loss_context():
                loss = self._loss(microbatch, loss_function) / normaliser
                loss.backward()  # type: ignore[no-untyped-call]
            parts.append(to_full(loss.detach()))
        settle_gradients(self.parameters())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """Return this rank's summed loss over `microbatches`, without gradients, in evaluation mode.

        Arguments and exceptions are those of `forward_backward`.
        """
        _check_any(microbatches)
        self._prepare_weights()
        with self._evaluating(), self._loss_context():
            return torch.stack([to_full(self._loss(m, loss_function)) for m in microbatches]).sum()

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for the given arguments, its tensors whole on every rank, in evaluation mode.

        All ranks call it together; those that share a place on the data axis with equal arguments. Under context
        parallelism tensors of the output that have this rank's number of tokens in the dim that the plan gives as
        `output` under `sequence` (1 if it does not) are gathered, their tokens in order; others stay this rank's own.
        """
        self._prepare_weights()
        with self._evaluating():
            if self._cut is None:
                return whole(self.parts[0](*args, **kwargs))
            part = self._cut.take(args, kwargs)
            return self._cut.gather(whole(self.parts[0](*part.args, **part.kwargs)), part.length)

    def sum_parts(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks that hold parts of it: all but those that `tp` made equal.

        Args:
            values: Of equal shape on all ranks, such as what `forward_backward` returns.
        """
        total = values.detach().clone()
        for name in MESH_DIMS:
            if name != "tp" and self.mesh[name].size() > 1:
                torch.distributed.all_reduce(total, group=self.mesh[name].get_group())
        return total

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Clip the gradients by their global norm and return it; see `titan_parallel.clip_grad_norm`."""
        return clip_grad_norm(self.parameters(), max_norm)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the plain model, parameter); a tied weight comes once, under its owner's name."""
        owners = dict(self._tied)
        for part in self.parts:
            for name, parameter in part.named_parameters():
                plain = clean_name(name)
                yield owners.get(plain, plain), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter once."""
        return (parameter for part in self.parts for parameter in part.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and persistent buffers by their names in the plain model; a tied weight comes once."""
        aliases = {alias for alias, _ in self._tied}
        state = {clean_name(name): value for part in self.parts for name, value in part.state_dict().items()}
        return {name: value for name, value in state.items() if name not in aliases}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state`, of the form that `state_dict` returns and of the same sharding, into the model.

        Raises:
            KeyError: If names are missing or unexpected; nothing is copied then.
            ValueError: If shapes differ; nothing is copied then.
        """
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise KeyError(f"the state does not fit the model: missing {missing}, unexpected {unexpected}")
        shapes = [(name, tuple(state[name].shape), tuple(value.shape)) for name, value in own.items()]
        wrong = [f"{name} is {given}, not {wanted}" for name, given, wanted in shapes if given != wanted]
        if wrong:  # copying would repeat a smaller tensor to fit
            raise ValueError(f"the state does not fit the model: {'; '.join(wrong)}")
        for name, value in own.items():
            if value is not state[name]:
                value.copy_(state[name])

    def describe(self) -> str:
        """Return a table of this rank's parameters: how each is split, its whole and its own shape, and its bytes."""
        return describe(self.named_parameters(), self.mesh, self._layout)

    def _loss(self, microbatch: Microbatch, loss_function: LossFunction) -> Tensor:
        args, kwargs, target = microbatch.args, microbatch.kwargs, microbatch.target
        if self._cut is not None:
            args, kwargs, target, _ = self._cut.take(args, kwargs, target)
        output = self.parts[0](*args, **kwargs)
        return loss_function(output if self._sharded_logits else whole(output), target)

    def _prepare_weights(self) -> None:
        if self._layout.options.float8 is not None and self._layout.options.float8.fsdp_all_gather:
            for part in self.parts:
                prepare_weights(part)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        # Some modules may be frozen in another mode than the rest.
        modes = [(module, module.training) for part in self.parts for module in part.modules()]
        for part in self.parts:
            part.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for part in self.parts:
                reshard(part)

    def _loss_context(self) -> AbstractContextManager[None]:
        return loss_parallel() if self._sharded_logits else nullcontext()


def _check_any(microbatches: Sequence[Microbatch]) -> None:
    if not microbatches:
        raise ValueError("there is no microbatch; every rank needs at least one, and as many as the others")
