"""`ParallelModel`: the interface of a training loop to a model, the same for every layout.

Made by `parallelize`. It cuts sequences (`context.inputs`), runs the parts by a `Run` (`sequential` or `pipeline`), and
presents parameters and state under the names of the original model.
"""

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
from titan_parallel.degrees import MESH_DIMS
from titan_parallel.describe import Layout, describe
from titan_parallel.float8 import prepare_weights
from titan_parallel.fsdp import reshard
from titan_parallel.plan import clean_name
from titan_parallel.sequential import LossFunction, Microbatch, Run
from titan_parallel.tensor.styles import settle_gradients
from titan_parallel.tied_weights import tie_weights


class ParallelModel:
    """A parallelized model, made by `parallelize`.

    Attributes:
        parts: The parts of the model on this rank: the model or, under pipeline parallelism, this rank's stages.
        mesh: The device mesh.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        mesh: DeviceMesh,
        tied: Sequence[tuple[str, str]],
        run: Run,
        *,
        layout: Layout,
        cut: SequenceCut | None,
    ) -> None:
        self.parts = tuple(parts)
        self.mesh = mesh
        self._tied = tied
        self._run = run
        self._layout = layout
        self._cut = cut
        # Of the dims with more than one rank. Kept, because looking up a dim builds a mesh each time.
        self._groups = {name: mesh[name].get_group() for name in MESH_DIMS if mesh[name].size() > 1}
        self._called: set[str] = set()

    def materialize(self, device: torch.device | str) -> None:
        """Allocate the parameters and buffers of a model built on meta, without initializing them.

        Args:
            device: Where to allocate; with `cpu_offload` parameters are allocated in host memory.
        """
        for part in self.parts:
            part.to_empty(device=torch.device("cpu" if self._layout.options.cpu_offload else device))
            for module in part.modules() if self._layout.options.cpu_offload else ():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
            names = {clean_name(name) for name, _ in part.named_parameters(remove_duplicate=False)}
            # `to_empty` makes two tensors of a tied one.
            tie_weights(part, [pair for pair in self._tied if names.issuperset(pair)])
        _share_buffers(self.parts)

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, num_target_tokens: float
    ) -> Tensor:
        """Accumulate the gradients of one step's loss: the sum over all microbatches of all ranks / num_target_tokens.

        Args:
            microbatches: This rank's share of the global batch, the same number of microbatches on each rank, with full
                sequences, of which context parallelism takes this rank's part.
            loss_function: Maps (output, target) to the *summed* loss, a scalar. The output is what the model returns,
                with full tensors, except logits that the plan leaves split over the vocabulary: on these,
                `torch.nn.functional.cross_entropy` with regular targets works as usual.
            num_target_tokens: The number to divide by, equal on all ranks: for the mean over tokens, the number of
                scored tokens of the global batch (labels that are not ignored).

        Returns:
            This rank's part of the loss, detached; `sum_parts` adds up those of all ranks.

        Raises:
            ValueError: If there is no microbatch, context parallelism cannot cut its sequences, or the loss function
                does not return a scalar.
            LayoutError: In the first call, if ranks differ in the number of microbatches or in `num_target_tokens`.
        """
        self._check_call("forward_backward", microbatches, num_target_tokens)
        self._prepare_weights()
        loss = self._run.forward_backward(self._own_tokens(microbatches), loss_function, num_target_tokens)
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
        """Return the model's output for the given arguments, with full tensors on every rank, in evaluation mode.

        All ranks call it together; ranks with the same place on the data axis must pass equal arguments. Under context
        parallelism, tensors of the output that have this rank's number of tokens in dim `plan["sequence"]["output"]`
        (default 1) are gathered, with their tokens in order; other tensors remain those of this rank.
        """
        self._prepare_weights()
        with self._evaluating():
            if self._cut is None:
                return self._run.predict(args, kwargs)
            part = self._cut.take(args, kwargs)
            return self._cut.gather(self._run.predict(part.args, part.kwargs), part.length)

    def sum_parts(self, values: Tensor, *, over_stages: bool = True) -> Tensor:
        """Return the sum of a tensor over all ranks that hold parts of it; tensor-parallel ranks hold equal values.

        Args:
            values: A tensor of equal shape on all ranks, such as the result of `forward_backward`.
            over_stages: Whether to sum over the stages of a pipeline too. If false, the sum is over the ranks that have
                different tokens for the same parts of the model.
        """
        total = values.detach().clone()
        for name, group in self._groups.items():
            if name != "tp" and (name != "pp" or over_stages):
                torch.distributed.all_reduce(total, group=group)
        return total

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Clip the gradients by their global norm and return the norm; see `titan_parallel.clip_grad_norm`."""
        return self._run.clip_grad_norm(list(self.parameters()), max_norm)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the original model, parameter) for this rank's parts.

        A tied weight is yielded once, under its owner's name. In a pipeline the ranks with the first and the last stage
        both have a copy of a weight that these share, under this name; treat both copies alike.
        """
        owners = dict(self._tied)
        seen: set[str] = set()
        for part in self.parts:
            for name, parameter in part.named_parameters():
                original = owners.get(clean_name(name), clean_name(name))
                if original not in seen:
                    seen.add(original)
                    yield original, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter once."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and persistent buffers of this rank's parts by their names in the original model.

        A tied weight is contained once, as in `named_parameters`.
        """
        owners = dict(self._tied)
        state: dict[str, Any] = {}
        for part in self.parts:
            for name, value in part.state_dict().items():
                state.setdefault(owners.get(clean_name(name), clean_name(name)), value)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state`, in the form and with the sharding that `state_dict` returns, into the model.

        Raises:
            KeyError: If names are missing or unexpected; nothing is copied.
            ValueError: If shapes or meshes differ; nothing is copied.
        """
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise KeyError(f"the state does not fit the model: missing {missing}, unexpected {unexpected}")
        shapes = [(name, tuple(state[name].shape), tuple(value.shape)) for name, value in own.items()]
        wrong = [f"{name} is {given}, not {wanted}" for name, given, wanted in shapes if given != wanted]
        wrong += [
            f"{name} is {_location(state[name])}, but {_location(value)} in the model: distribute it like the model's "
            "first, or load by a checkpointer that reshards, such as torch.distributed.checkpoint"
            for name, value in own.items()
            if _mesh(state[name]) != _mesh(value)
        ]
        if wrong:  # `copy_` would broadcast a smaller tensor
            raise ValueError(f"the state does not fit the model: {'; '.join(wrong)}")
        for name, value in own.items():
            if value is not state[name]:
                value.copy_(state[name])

    def describe(self) -> str:
        """Return a table of this rank's parameters: how each is split, its full and its local shape, and its bytes."""
        return describe(self.named_parameters(), self.mesh, self._layout)

    def _check_call(self, call: str, microbatches: Sequence[Microbatch], num_target_tokens: float = 1.0) -> None:
        """Check that there are microbatches and, in the first such call, that all ranks got equal arguments."""
        if call not in self._called:
            check_agreement(
                {
                    f"the number of microbatches of {call}": len(microbatches),
                    "num_target_tokens": float(num_target_tokens),
                }
            )
            if (
                self.mesh["tp"].size() > 1
                and not self._layout.options.sequence_parallel
                and self.mesh.device_type == "cpu"
            ):
                self._check_random()
            self._called.add(call)
        if not microbatches:
            raise ValueError("microbatches: is empty; pass at least one on every rank, the same number on all")

    def _check_random(self) -> None:
        """Check that tensor-parallel ranks will draw equal dropout masks, which on CUDA torch ensures."""
        modules = [module for part in self.parts for module in part.modules()]
        if any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in modules):
            state = hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()[:8]
            check_agreement({"the state of torch's random generator (for dropout)": state}, self.mesh["tp"].get_group())

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
        # Modes are restored module by module: frozen modules may be in evaluation mode.
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
    """Let parts that have a buffer in common hold one tensor, so that it is initialized once."""
    first: dict[str, Tensor] = {}
    for part in parts:
        for name, buffer in list(part.named_buffers()):
            kept = first.setdefault(clean_name(name), buffer)
            module, _, key = name.rpartition(".")
            setattr(part.get_submodule(module), key, kept)


def _mesh(x: Tensor) -> DeviceMesh | None:
    return x.device_mesh if isinstance(x, DTensor) else None


def _location(x: Tensor) -> str:
    mesh = _mesh(x)
    return "a regular tensor" if mesh is None else f"on a mesh of {mesh.mesh_dim_names} {list(mesh.shape)}"
