"""A stage of a pipeline: the model itself, with what is not its own left out.

Every rank of a pipeline reads the same rows, so each stage runs the model's own forward with all its arguments: masks,
rotary tables and the like are computed where they are needed, and stages exchange the hidden state alone, the first
argument of a block. Modules before the first block are stood in for by zeros of their outputs' shapes; blocks before
the stage's own hand on what they get; the first own block takes what was received in place of its first argument; and
the block after the last own one ends the forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, zeros
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from titan_parallel.errors import LayoutError
from titan_parallel.plan import ParallelPlan, Roles, match_names
from titan_parallel.splittable import is_splittable


class Arguments(Protocol):
    """What a model is called with."""

    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102

    @property
    def kwargs(self) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class Like:
    """What is known of a tensor on a rank that has it not: whole shape and stride, dtype, tensor-parallel layout."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...] | None

    @classmethod
    def of(cls, x: Tensor) -> Like:
        """Describe a tensor."""
        return cls(x.shape, x.stride(), x.dtype, x.placements if isinstance(x, DTensor) else None)

    def zeros(self, device: torch.device, mesh: DeviceMesh) -> Tensor:
        """Return zeros of this description."""
        if self.placements is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        return zeros(self.shape, dtype=self.dtype, device_mesh=mesh, placements=self.placements)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class _Hidden:
    """Stands for the hidden state in the output of a block."""


@dataclass(frozen=True)
class Boundary:
    """What passes between stages, and what has to be known of the modules that are elsewhere.

    Attributes:
        hidden: The first argument of every block.
        local: Shape of what one rank holds and sends of it.
        stand_ins: For each module before the blocks, what each of its calls in one forward returns, in `Like`.
        block_output: What a block returns, `_Hidden` and `Like` in the place of tensors.
    """

    hidden: Like
    local: torch.Size
    stand_ins: dict[str, list[Any]]
    block_output: Any


@dataclass
class Flow:
    """What one stage's modules share while it runs.

    Attributes:
        device: Where it computes.
        mesh: The tensor-parallel mesh, which DTensors between blocks lie on.
        boundary: Of the microbatch that is computed.
        received: The hidden state from the stage before.
        sent: The hidden state for the stage after.
        calls: How often each absent module before the blocks was called in this forward.
        probe: Where to note what the first block gets and returns; the forward ends there.
    """

    device: torch.device
    mesh: DeviceMesh
    boundary: Boundary | None = None
    received: Tensor | None = None
    sent: Tensor | None = None
    calls: Counter[str] = field(default_factory=Counter)
    probe: _Probe | None = None


@dataclass
class _Probe:
    hidden: Tensor | None = None
    output: Any = None
    stand_ins: dict[str, list[Any]] = field(default_factory=dict)
    complaint: str = ""


class _Reached(BaseException):
    """Ends a forward where the stage's own part ends. No `Exception`: no fallback of a model may catch it."""


class _Absent(nn.Module):
    """Stands for a module of another stage: keeps its plain attributes, which a model may look at, and no tensor."""

    def __init__(self, name: str, original: nn.Module, flow: Flow) -> None:
        super().__init__()
        self._name, self._flow = name, flow
        for key, value in vars(original).items():
            if not key.startswith("_") and key != "training" and not tree_leaves_have_tensors(value):
                self.__dict__[key] = value

    def extra_repr(self) -> str:
        return "on another stage"


class _StandIn(_Absent):
    """A module before the blocks, on a later stage: zeros, which nothing is computed from."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flow = self._flow
        assert flow.boundary is not None
        outputs = flow.boundary.stand_ins.get(self._name) or [flow.boundary.hidden]
        like = outputs[min(flow.calls[self._name], len(outputs) - 1)]
        flow.calls[self._name] += 1
        return tree_map_only(Like, lambda one: one.zeros(flow.device, flow.mesh), like)


class _PassOn(_Absent):
    """A block of an earlier stage: returns its first argument as a block of this model does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flow = self._flow
        assert flow.boundary is not None
        hidden = first_argument(args, kwargs)
        output = tree_map_only(Like, lambda one: one.zeros(flow.device, flow.mesh), flow.boundary.block_output)
        return tree_map_only(_Hidden, lambda _: hidden, output)


class _Exit(_Absent):
    """A block or later module of a later stage: the forward ends at the first that is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._flow.sent = first_argument(args, kwargs)
        raise _Reached


class _Entrance(nn.Module):
    """Gives a stage's first block what was received. Of the model's first block, it tells what goes in and out."""

    def __init__(self, block: nn.Module, flow: Flow) -> None:
        super().__init__()
        self._entered_module = block
        self._flow = flow

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._entered_module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flow = self._flow
        if flow.received is not None:
            if args:
                args = (flow.received, *args[1:])
            else:
                kwargs = {**kwargs, next(iter(kwargs)): flow.received}
        output = self._entered_module(*args, **kwargs)
        if flow.probe is None:
            return output
        note(flow.probe, args, kwargs, output)
        raise _Reached


class Stage(nn.Module):
    """One stage, as torch's pipeline schedules call it: hidden state in, hidden state or loss out.

    Attributes:
        part: The model without what is on other stages.
        flow: What its modules share.
        microbatch: What to compute next; set before each call.
        finish: Makes the result of the last stage: (output of the model, microbatch) to a scalar.
        examines: Whether to find out, in the next forward with gradients, if the backward can be run in two halves.
        splits_backward: What was found.
    """

    microbatch: Arguments
    finish: Callable[[Any, Any], Tensor] | None = None
    examines: bool = False
    splits_backward: bool | None = None

    def __init__(self, part: nn.Module, flow: Flow, before: Sequence[str], is_last: bool) -> None:
        super().__init__()
        self.part = part
        self.flow = flow
        self._before = tuple(before)
        self._is_last = is_last

    def forward(self, received: Tensor | None = None) -> Tensor:
        """Compute the microbatch from what was received (but on the first stage) to what is to be sent, or the loss."""
        flow = self.flow
        flow.calls.clear()
        flow.received = None if received is None else self._unpacked(received)
        try:
            output = self.part(*self.microbatch.args, **self.microbatch.kwargs)
        except _Reached:
            hidden, flow.sent, flow.received = flow.sent, None, None
            if hidden is None:
                return torch.zeros(())
            sent = self._packed(hidden)
            if self.examines and received is not None and sent.requires_grad:
                self.examines, self.splits_backward = False, is_splittable(sent, received)
            return sent
        flow.received = None
        if not self._is_last or self.finish is None:
            raise RuntimeError("the model's forward ended before it called the blocks of later pipeline stages")
        return self.finish(output, self.microbatch)

    def look(self) -> Boundary:
        """Run the forward up to the first block, on the first stage, to see what stages have to know of one another.

        Raises:
            LayoutError: If more than the hidden state would have to pass between stages.
        """
        probe = _Probe()
        with _noting_outputs(self.part, self._before, probe.stand_ins):
            self.flow.probe = probe
            try:
                self()
            finally:
                self.flow.probe = None
        if probe.complaint:
            raise LayoutError(probe.complaint)
        if probe.hidden is None:
            raise LayoutError("the model's forward ended without calling its first block")
        local = probe.hidden.to_local() if isinstance(probe.hidden, DTensor) else probe.hidden
        return Boundary(Like.of(probe.hidden), local.shape, probe.stand_ins, _template(probe.output))

    def _unpacked(self, received: Tensor) -> Tensor:
        assert self.flow.boundary is not None
        hidden: Tensor = _Arrive.apply(received)
        like = self.flow.boundary.hidden
        if like.placements is None:
            return hidden
        return DTensor.from_local(
            hidden, self.flow.mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride
        )

    def _packed(self, hidden: Tensor) -> Tensor:
        boundary = self.flow.boundary
        assert boundary is not None
        found, wanted = Like.of(hidden), boundary.hidden
        if (found.shape, found.dtype, found.placements) != (wanted.shape, wanted.dtype, wanted.placements):
            raise RuntimeError(f"blocks have to keep the hidden state's shape and dtype, {wanted}, but return {found}")
        left: Tensor = _Leave.apply(_settled(hidden.to_local() if isinstance(hidden, DTensor) else hidden))
        return left


class _Leave(torch.autograd.Function):
    """The identity on what is sent: no view, even of itself, as torch detaches a stage's output in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data  # shares memory, and is a view to nobody

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Arrive(torch.autograd.Function):
    """The identity on what was received; its gradient is made fit to be sent back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _settled(grad)


def _settled(x: Tensor) -> Tensor:
    """Return `x` dense, and with no collective in flight that it waits for (which torch has a subclass for)."""
    return (x if type(x) is Tensor else x.clone()).contiguous()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a block is called with first."""
    return args[0] if args else next(iter(kwargs.values()))


def note(probe: _Probe, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Note what the model's first block gets and returns, and whether stages could do with that."""
    probe.output = output
    hidden, *others = [*args, *kwargs.values()]
    leaves = tree_leaves(output)
    if not isinstance(hidden, Tensor) or not leaves or not isinstance(leaves[0], Tensor):
        probe.complaint = (
            "a block has to take the hidden state, one tensor, as its first argument and return it first, for "
            f"pipeline stages to exchange it; this model's takes a {type(hidden).__name__} and returns a "
            f"{type(output).__name__}"
        )
        return
    probe.hidden = hidden
    found, wanted = Like.of(leaves[0]), Like.of(hidden)
    if (found.shape, found.dtype, found.placements) != (wanted.shape, wanted.dtype, wanted.placements):
        probe.complaint = f"blocks have to keep the hidden state's shape, dtype and layout: {wanted} becomes {found}"
    elif any(isinstance(x, Tensor) and x.requires_grad for x in [*tree_leaves(others), *leaves[1:]]):
        probe.complaint = (
            "pipeline stages exchange the first argument of their blocks alone, but the first block gets or returns "
            "another tensor that depends on parameters: take pp 1, or compute it inside each block"
        )


def cut(
    model: nn.Module, roles: Roles, own: Roles, flow: Flow, tied: Sequence[tuple[str, str]]
) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Leave out of a model, in place, what is not a stage's own.

    Args:
        model: The whole model, or a copy of it.
        roles: All modules that stages share out.
        own: Those of this stage.
        flow: What its modules are to share.
        tied: Pairs of tied parameters.

    Returns:
        The model, and the pairs that are both here.
    """
    first, last = (roles.blocks.index(name) for name in (own.blocks[0], own.blocks[-1]))
    for names, kept, kind in (
        (roles.before, own.before, _StandIn),
        (roles.blocks[:first], [], _PassOn),
        (roles.blocks[last + 1 :], [], _Exit),
        (roles.after, own.after, _Exit),
    ):
        for name in names:
            if name not in kept:
                model.set_submodule(name, kind(name, model.get_submodule(name), flow))
    here = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return model, [pair for pair in tied if here.issuperset(pair)]


def enter(model: nn.Module, own: Roles, flow: Flow) -> None:
    """Let a stage's first block take what the stage receives; after all transforms of the block."""
    name = own.blocks[0]
    model.set_submodule(name, _Entrance(model.get_submodule(name), flow))


def check_divisible(model: nn.Module, roles: Roles) -> None:
    """Check that every parameter belongs to a module that a stage can have for its own.

    Raises:
        LayoutError: With the names of those that do not.
    """
    prefixes = tuple(f"{name}." for name in [*roles.before, *roles.blocks, *roles.after])
    stray = [name for name, _ in model.named_parameters() if not name.startswith(prefixes)]
    if not roles.blocks:
        raise LayoutError("pp is more than 1, but the plan names no blocks to make stages of")
    if stray:
        raise LayoutError(
            f"pp is more than 1, but these parameters are in no module that the plan names as 'before', 'blocks' or "
            f"'after', so no stage owns them: {', '.join(stray)}"
        )


def stage_plan(model: nn.Module, plan: ParallelPlan, roles: Roles, own: Roles) -> ParallelPlan:
    """Return the plan of one stage: names instead of patterns, without those of modules that are elsewhere.

    Args:
        model: The whole model, before anything is cut.
        plan: Its plan.
        roles: All modules that stages share out.
        own: Those of the stage.
    """
    kept = {*own.before, *own.blocks, *own.after}
    absent = [name for name in [*roles.before, *roles.blocks, *roles.after] if name not in kept]
    prefixes = tuple(f"{name}." for name in absent)

    def here(patterns: Sequence[str]) -> list[str]:
        found = match_names(model, patterns, parameters=True)
        return [
            name
            for pattern in patterns
            for name in found[pattern]
            if name not in absent and not name.startswith(prefixes)
        ]

    styles = plan.get("tensor", {})
    return {
        **plan,
        "before": own.before,
        "blocks": own.blocks,
        "after": own.after,
        "tensor": {name: style for pattern, style in styles.items() for name in here([pattern])},
        "attention": here(plan.get("attention", ())),
        "experts": here(plan.get("experts", ())),
    }


def _template(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    described = [Like.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten([_Hidden(), *described[1:]], spec)


def tree_leaves_have_tensors(value: object) -> bool:
    """Whether a value is or holds a tensor or a module."""
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value))


@contextmanager
def _noting_outputs(model: nn.Module, names: Sequence[str], outputs: dict[str, list[Any]]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append(tree_map_only(Tensor, Like.of, output))

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
