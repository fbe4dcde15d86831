"""`ParallelModel`: the interface of a training loop to a model, the same for every layout.

Made by `parallelize`. It cuts sequences (`context.inputs`), runs the parts by a `Run` (`sequential` or `pipeline`), and
presents parameters and state under the names of the original model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_parallel.autocast import uncached_casts
from titan_parallel.batch_state import check_equal_buffers
from titan_parallel.context.inputs import SequenceCut
from titan_parallel.degrees import MESH_DIMS
from titan_parallel.describe import Layout, describe
from titan_parallel.failures import Failures
from titan_parallel.float8 import prepare_weights
from titan_parallel.fsdp import checking_units, units_of
from titan_parallel.materialize import materialize
from titan_parallel.mesh import fsdp_mesh
from titan_parallel.plan import clean_name
from titan_parallel.random_streams import own_random_stream, random_digest, stream_index
from titan_parallel.same_data import check_same_data
from titan_parallel.sequential import Microbatch, Run
from titan_parallel.step import LossFunction, Step, host_group
from titan_parallel.tensor.styles import settle_gradients


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
        self._host_group = host_group()
        self._failures = Failures(self._host_group)
        self._stream = stream_index(mesh)
        self._called: set[str] = set()
        self._broken = ""
        self._units = [unit for part in self.parts for _, unit in units_of(part)]
        self._sharing = fsdp_mesh(mesh).mesh.flatten().tolist()  # ranks with the same parameters
        self._is_in_call = False

    def materialize(self, device: torch.device | str, *, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Allocate the tensors of a model built on meta; parameters and persistent buffers are not initialized.

        Tensors that are not on meta keep their values. Non-persistent buffers, such as rotary frequencies, are in no
        state dict: they are filled from `buffers`, by a method `reset_buffers(device)` of their module, or, in models
        of `transformers`, as these do.

        Args:
            device: Where to allocate; with `cpu_offload` parameters are allocated in host memory.
            buffers: Values of non-persistent buffers, by their names in the original model.

        Raises:
            LayoutError: If non-persistent buffers are filled in none of these ways; the message names them.
        """
        materialize(
            self.parts, self._tied, device=device, offloads=self._layout.options.cpu_offload, buffers=buffers or {}
        )

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
            LayoutError: On all ranks, if they differ in the number of microbatches or in `num_target_tokens` or, in the
                first call, if ranks that share sequences (pp, cp, tp) got different ones.
            Exception: Whatever the loss function raises on this rank, and a `RuntimeError` on the other ranks. All
                gradients are dropped then, and the model can be used further.
        """
        is_first = "forward_backward" not in self._called
        with self._call("forward_backward", microbatches, num_target_tokens) as step:
            mine, guarded = self._own_tokens(microbatches), step.guard(loss_function)
            with own_random_stream(self._stream, self.mesh.device_type) as drawn:
                loss = self._run.forward_backward(mine, guarded, num_target_tokens, step)
            if drawn.any and "tp" in self._groups and not self._layout.options.sequence_parallel:
                step.check_random(torch.distributed.get_process_group_ranks(self._groups["tp"]))
            settle_gradients(self.parameters())
            if is_first:
                step.fail(check_equal_buffers(self.parts, self.mesh))
            step.check_trained([parameter.grad is not None for parameter in self.parameters()], self._sharing)
        return loss

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """Return this rank's summed loss over `microbatches`, without gradients, in evaluation mode.

        Arguments and exceptions are those of `forward_backward`.
        """
        with self._call("evaluate", microbatches) as step, self._evaluating():
            return self._run.evaluate(self._own_tokens(microbatches), step.guard(loss_function), step)

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for the given arguments, with full tensors on every rank, in evaluation mode.

        All ranks call it together; ranks with the same place on the data axis must pass equal arguments. Under context
        parallelism, tensors of the output that have this rank's number of tokens in dim `plan["sequence"]["output"]`
        (default 1) are gathered, with their tokens in order; other tensors remain those of this rank.
        """
        with self._evaluating():
            return self._forward(args, kwargs)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output like `predict`, but in the mode that the model is in, and without gradients."""
        return self._forward(args, kwargs)

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
        self._free_gathered()
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

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, or set them to zero."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Set all modules of this rank's parts to training mode, or to evaluation mode."""
        for part in self.parts:
            part.train(mode)
        return self

    def eval(self) -> Self:
        """Set all modules of this rank's parts to evaluation mode. `evaluate` and `predict` do so for their time."""
        return self.train(mode=False)

    def modules(self) -> Iterator[nn.Module]:
        """Yield every module of this rank's parts."""
        return (module for part in self.parts for module in part.modules())

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and persistent buffers of this rank's parts by their names in the original model.

        A tied weight is contained once, as in `named_parameters`.
        """
        self._free_gathered()
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

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._call("predict", [Microbatch(args, None, kwargs)]) as step:
            if self._cut is None:
                return self._run.predict(args, kwargs, step)
            part = self._cut.take(args, kwargs)
            return self._cut.gather(self._run.predict(part.args, part.kwargs, step), part.length)

    @contextmanager
    def _call(self, call: str, microbatches: Sequence[Microbatch], num_target_tokens: float = 1.0) -> Iterator[Step]:
        """Begin and end a call that all ranks make together."""
        if self._broken:
            raise RuntimeError(
                f"model: an earlier call failed in the middle ({self._broken}), so that ranks are no longer in step; "
                "start again, from a checkpoint"
            )
        random = random_digest(self.mesh.device_type)
        step = Step(call, len(microbatches), num_target_tokens, random, self._host_group)
        is_first = call not in self._called
        self._failures.begin()
        if is_first:
            step.agree()
        if not microbatches:
            error = ValueError("microbatches: is empty; pass at least one on every rank, the same number on all")
            if not is_first:  # the others may be in their first forward, where they wait for this rank
                self._break(call, error)
            raise error
        if is_first:
            check_same_data(microbatches, self.mesh)
            self._called.add(call)
        self._free_gathered()
        self._prepare_weights()
        self._is_in_call = True
        try:
            with ExitStack() as stack:
                stack.enter_context(uncached_casts(self.mesh.device_type))
                for part in self.parts if is_first and call == "forward_backward" and self._units else ():
                    stack.enter_context(checking_units(part, self.mesh))
                yield step
        except BaseException as error:
            first = self._break(call, error) if step.has_sent else error
            if first is not error:
                raise first from error
            raise
        finally:
            self._is_in_call = False
            if call != "forward_backward":
                self._free_gathered()
        try:
            step.close()
        except Exception:
            if call == "forward_backward":
                for parameter in self.parameters():
                    parameter.grad = None
            raise

    def _break(self, call: str, error: BaseException) -> BaseException:
        """Refuse later calls if ranks may be out of step now, and return the exception that came first on any rank."""
        if not self._groups:
            return error
        first = self._failures.first(call, error)
        self._broken = f"{type(first).__name__}: {first}"
        return first

    def _own_tokens(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        if self._cut is None:
            return list(microbatches)
        parts = [self._cut.take(m.args, m.kwargs, m.target) for m in microbatches]
        return [Microbatch(part.args, part.target, part.kwargs) for part in parts]

    def _prepare_weights(self) -> None:
        if self._layout.options.float8 is not None and self._layout.options.float8.fsdp_all_gather:
            for part in self.parts:
                prepare_weights(part)

    def _free_gathered(self) -> None:
        """Free weights that a forward of a part by itself has left gathered: they would be used after an update."""
        if not self._is_in_call:
            for unit in self._units:
                unit.reshard()

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


def _mesh(x: Tensor) -> DeviceMesh | None:
    return x.device_mesh if isinstance(x, DTensor) else None


def _location(x: Tensor) -> str:
    mesh = _mesh(x)
    return "a regular tensor" if mesh is None else f"on a mesh of {mesh.mesh_dim_names} {list(mesh.shape)}"
