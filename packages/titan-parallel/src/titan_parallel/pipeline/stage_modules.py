"""What a stage has in the place of modules of other stages, and at its ends.

Modules before the first block are stood in for by empty tensors of their outputs' shapes; blocks before the stage's own
hand on what they get; the first own block takes what was received in place of its first argument; and the block after
the last own one ends the forward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from titan_parallel.pipeline.boundary import Boundary, Hidden, Like, Probe, first_argument, note
from titan_parallel.pipeline.transfer import fits, pack, unpack


@dataclass(frozen=True)
class Parting:
    """Where the graph of the last stage is parted, in what the blocks computed and what was computed from that.

    Attributes:
        left: The hidden state that the blocks ended with.
        arrived: The leaf that all that follows was computed from.
    """

    left: Tensor
    arrived: Tensor


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
        parts: Whether to part the graph of the last stage behind its blocks.
        parting: Where it was parted.
        stand_ins: If not None, where to note tensors that stand for what other stages compute, each with the name of
            the module that computes it.
        ended: Noted with these: the hidden state that the model's last block ended with.
    """

    device: torch.device
    mesh: DeviceMesh
    boundary: Boundary | None = None
    received: Tensor | None = None
    sent: Tensor | None = None
    calls: Counter[str] = field(default_factory=Counter)
    probe: Probe | None = None
    parts: bool = False
    parting: Parting | None = None
    stand_ins: list[tuple[Tensor, str]] | None = None
    ended: Tensor | None = None

    def stand_for(self, like: Like, name: str) -> Tensor:
        """Return a tensor in place of one of a module that is elsewhere; nothing may be computed from it."""
        stand_in = like.unknown(self.device, self.mesh)
        if self.stand_ins is None or not torch.is_grad_enabled() or not stand_in.is_floating_point():
            return stand_in
        self.stand_ins.append((stand_in.requires_grad_(), name))
        return stand_in.clone()  # no leaf, which a model could not change in place


class Reached(BaseException):
    """Ends a forward where the stage's own part ends. No `Exception`: no fallback of a model may catch it."""


class _Absent(nn.Module):
    """Stands for a module of another stage: keeps its plain attributes, which a model may look at, and no tensor."""

    def __init__(self, name: str, original: nn.Module, flow: Flow) -> None:
        super().__init__()
        self._name, self._flow = name, flow
        for key, value in vars(original).items():
            if not key.startswith("_") and key != "training" and not _holds_tensors(value):
                self.__dict__[key] = value

    def extra_repr(self) -> str:
        return "on another stage"


class StandIn(_Absent):
    """A module before the blocks, on a later stage."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what has the shapes of what the absent module returns."""
        flow = self._flow
        assert flow.boundary is not None
        outputs = flow.boundary.stand_ins.get(self._name) or [flow.boundary.hidden]
        like = outputs[min(flow.calls[self._name], len(outputs) - 1)]
        flow.calls[self._name] += 1
        return tree_map_only(Like, lambda one: flow.stand_for(one, self._name), like)


class PassOn(_Absent):
    """A block of an earlier stage: returns its first argument as a block of this model does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument, with what has the shapes of what else the absent block returns."""
        flow = self._flow
        assert flow.boundary is not None
        hidden = first_argument(args, kwargs)
        output = tree_map_only(Like, lambda one: flow.stand_for(one, self._name), flow.boundary.block_output)
        return tree_map_only(Hidden, lambda _: hidden, output)


class Exit(_Absent):
    """A block or later module of a later stage: the forward ends at the first that is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """End the forward."""
        self._flow.sent = first_argument(args, kwargs)
        raise Reached


class _Around(nn.Module):
    """Stands around a block and has its attributes."""

    def __init__(self, block: nn.Module, flow: Flow) -> None:
        super().__init__()
        self._entered_module = block
        self._flow = flow

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._entered_module, name)


class Entrance(_Around):
    """Gives a stage's first block what was received. Of the model's first block, it tells what goes in and out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on what was received."""
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
        raise Reached


class End(_Around):
    """Stands around the model's last block and, if it is asked to, parts the graph behind it.

    What follows the blocks often ends in a fused loss, whose backward runs once. With its graph apart it does, while
    that of the blocks runs in two halves.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        flow = self._flow
        output = self._entered_module(*args, **kwargs)
        leaves, spec = tree_flatten(output)
        hidden = leaves[0]
        if not isinstance(hidden, Tensor) or not hidden.requires_grad:
            return output
        assert flow.boundary is not None
        if flow.parts and fits(hidden, flow.boundary):
            left = pack(hidden, flow.boundary)
            flow.parting = Parting(left, left.detach().requires_grad_())
            leaves[0] = unpack(flow.parting.arrived, flow.boundary, flow.mesh)
            hidden = left
        if flow.stand_ins is not None:
            flow.ended = hidden
        return tree_unflatten(leaves, spec)


def _holds_tensors(value: object) -> bool:
    """Whether a value is or holds a tensor or a module."""
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value))
