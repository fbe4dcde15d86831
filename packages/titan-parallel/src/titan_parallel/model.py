"""`ParallelModel`: one object through which a training loop drives a model, whatever its layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_parallel.agreement import check_agreement
from titan_parallel.context.inputs import SequenceCut
from titan_parallel.describe import Layout, describe
from titan_parallel.float8 import prepare_weights
from titan_parallel.fsdp import reshard
from titan_parallel.mesh import MESH_DIMS
from titan_parallel.plan import clean_name
from titan_parallel.sequential import LossFunction, Microbatch, Run
from titan_parallel.tensor.styles import settle_gradients
from titan_parallel.tied_weights import tie_weights


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
        run: Run,
        layout: Layout,
        cut: SequenceCut | None,
    ) -> None:
        self.parts = tuple(parts)
        self.mesh = mesh
        self._tied = tied
        self._run = run
        self._layout = layout
        self._cut = cut
        # By dim, of those that have more than one rank. (To look a dim up builds a mesh of it.)
        self._groups = {name: mesh[name].get_group() for name in MESH_DIMS if mesh[name].size() > 1}
        self._called: set[str] = set()

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
            names = {clean_name(name) for name, _ in part.named_parameters(remove_duplicate=False)}
            # `to_empty` makes two tensors of a tied one
            tie_weights(part, [pair for pair in self._tied if names.issuperset(pair)])
        _share_buffers(self.parts)

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
            ValueError: If there is no microbatch, context parallelism cannot cut its sequences, or the loss function
                returns no scalar.
            LayoutError: In the first call, if ranks have other numbers of microbatches, or another normaliser.
        """
        self._check_call("forward_backward", microbatches, normaliser)
        self._prepare_weights()
        loss = self._run.forward_backward(self._own_tokens(microbatches), loss_function, normaliser)
        settle_gradients(self.parameters())
        return loss

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """Return this rank's summed loss over `microbatches`, without gradients, in evaluation mode.

        Arguments and exceptions are those of `forward_backward`.
        """
        self._check_call("evaluate", microbatches)
        self._prepare_weights()
        with self._evaluating():
            return self._run.evaluate(self._own_tokens(microbatches), loss_function)

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
                return self._run.predict(args, kwargs)
            part = self._cut.take(args, kwargs)
            return self._cut.gather(self._run.predict(part.args, part.kwargs), part.length)

    def sum_parts(self, values: Tensor, *, over_stages: bool = True) -> Tensor:
        """Return the sum of a tensor over all ranks that hold parts of it: all but those that `tp` made equal.

        Args:
            values: Of equal shape on all ranks of the sum, such as what `forward_backward` returns.
            over_stages: Whether to sum over the stages of a pipeline too. Without, it is the sum over the ranks that
                have other tokens for the same parts of the model.
        """
        total = values.detach().clone()
        for name, group in self._groups.items():
            if name != "tp" and (name != "pp" or over_stages):
                torch.distributed.all_reduce(total, group=group)
        return total

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Clip the gradients by their global norm and return it; see `titan_parallel.clip_grad_norm`."""
        return self._run.clip_grad_norm(list(self.parameters()), max_norm)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the plain model, parameter) of this rank's parts.

        A tied weight comes once, under its owner's name. In a pipeline the ranks with the first and the last stage
        both have a copy of a weight that these share, under this name; what is done with one has to be done with both.
        """
        owners = dict(self._tied)
        seen: set[str] = set()
        for part in self.parts:
            for name, parameter in part.named_parameters():
                plain = owners.get(clean_name(name), clean_name(name))
                if plain not in seen:
                    seen.add(plain)
                    yield plain, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter once."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and persistent buffers of this rank's parts by their names in the plain model.

        A tied weight comes once, as in `named_parameters`.
        """
        owners = dict(self._tied)
        state: dict[str, Any] = {}
        for part in self.parts:
            for name, value in part.state_dict().items():
                state.setdefault(owners.get(clean_name(name), clean_name(name)), value)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state`, of the form that `state_dict` returns and of the same sharding, into the model.

        Raises:
            KeyError: If names are missing or unexpected; nothing is copied then.
            ValueError: If shapes or meshes differ; nothing is copied then.
        """
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise KeyError(f"the state does not fit the model: missing {missing}, unexpected {unexpected}")
        shapes = [(name, tuple(state[name].shape), tuple(value.shape)) for name, value in own.items()]
        wrong = [f"{name} is {given}, not {wanted}" for name, given, wanted in shapes if given != wanted]
        wrong += [
            f"{name} is {_lies(state[name])}, but {_lies(value)} in the model: distribute it as there first, or load "
            "by what reshards, such as torch.distributed.checkpoint"
            for name, value in own.items()
            if _mesh(state[name]) != _mesh(value)
        ]
        if wrong:  # copying would repeat a smaller tensor to fit
            raise ValueError(f"the state does not fit the model: {'; '.join(wrong)}")
        for name, value in own.items():
            if value is not state[name]:
                value.copy_(state[name])

    def describe(self) -> str:
        """Return a table of this rank's parameters: how each is split, its whole and its own shape, and its bytes."""
        return describe(self.named_parameters(), self.mesh, self._layout)

    def _check_call(self, call: str, microbatches: Sequence[Microbatch], normaliser: float = 1.0) -> None:
        """Check that there are microbatches and, in the first such call, that all ranks were asked for the same."""
        if call not in self._called:
            check_agreement(
                {f"the number of microbatches of {call}": len(microbatches), "the normaliser": float(normaliser)}
            )
            if (
                self.mesh["tp"].size() > 1
                and not self._layout.options.sequence_parallel
                and self.mesh.device_type == "cpu"
            ):
                self._check_random()
            self._called.add(call)
        if not microbatches:
            raise ValueError("there is no microbatch; every rank needs at least one, and as many as the others")

    def _check_random(self) -> None:
        """Check that tensor-parallel ranks drop the same of what each has in whole; on CUDA torch sees to it."""
        modules = [module for part in self.parts for module in part.modules()]
        if any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in modules):
            state = hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()[:8]
            check_agreement({"the state of torch's random generator, for dropout,": state}, self.mesh["tp"].get_group())

    def _own_tokens(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        if self._cut is None:
            return list(microbatches)
        parts = [self._cut.take(m.args, m.kwargs, m.target) for m in microbatches]
        return [Microbatch(part.args, part.target, part.kwargs) for part in parts]

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


def _share_buffers(parts: Sequence[nn.Module]) -> None:
    """Let parts that have a buffer in common hold one tensor, which is filled once."""
    first: dict[str, Tensor] = {}
    for part in parts:
        for name, buffer in list(part.named_buffers()):
            kept = first.setdefault(clean_name(name), buffer)
            module, _, key = name.rpartition(".")
            setattr(part.get_submodule(module), key, kept)


def _mesh(x: Tensor) -> DeviceMesh | None:
    return x.device_mesh if isinstance(x, DTensor) else None


def _lies(x: Tensor) -> str:
    mesh = _mesh(x)
    return "a plain tensor" if mesh is None else f"on a mesh of {mesh.mesh_dim_names} {list(mesh.shape)}"
