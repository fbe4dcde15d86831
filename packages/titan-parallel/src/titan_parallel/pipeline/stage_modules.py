"""The modules that a stage has in the place of other stages' modules, and around its own first and last block.

`StandIn`, for modules before the blocks, returns NaN tensors of the right shapes; `PassOn`, for blocks of earlier
stages, returns its first argument; `Entrance`, around the first own block, replaces its first argument by the received
hidden state; `Exit`, for later modules, ends the forward; `End`, around the model's last block, may split the graph.
`partition` puts them into the model; README.md in this directory shows the sequence of a forward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel._torch_compat import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from titan_parallel.pipeline.boundary import Boundary, HiddenState, Probe, TensorMeta, first_argument, record_block
from titan_parallel.pipeline.transfer import fits, pack, unpack


@dataclass(frozen=True)
class GraphSplit:
    """The point behind the last block where the graph of the last stage is split in two.

    Attributes:
        output: The hidden state that the blocks computed.
        leaf: The leaf that everything after the blocks is computed from.
    """

    output: Tensor
    leaf: Tensor


@dataclass
class Flow:
    """State that the modules of one stage share during a forward.

    Set once: `device` and `mesh`. Set by the stage or the schedule before a forward: `boundary`, `received`, `probe`,
    `splits_graph` and `stand_ins`. Set by modules during the forward: `sent`, `calls`, `graph_split`, `end_hidden`.

    Attributes:
        device: The device that the stage computes on.
        mesh: The tensor-parallel mesh of DTensors between blocks.
        boundary: What stages exchange for the microbatch at hand.
        received: The hidden state from the previous stage.
        sent: The hidden state for the next stage.
        calls: Number of calls of each stand-in in this forward.
        probe: If set, `Entrance` records its block's input and output here and ends the forward (shape inference).
        splits_graph: Whether `End` splits the graph of the last stage behind its blocks.
        graph_split: Where it was split.
        stand_ins: If set, tensors returned in the place of other stages' results are recorded here, with the names of
            the modules that they stand for (dry run).
        end_hidden: Recorded together with these: the hidden state that the model's last block returned.
    """

    device: torch.device
    mesh: DeviceMesh
    boundary: Boundary | None = None
    received: Tensor | None = None
    sent: Tensor | None = None
    calls: Counter[str] = field(default_factory=Counter)
    probe: Probe | None = None
    splits_graph: bool = False
    graph_split: GraphSplit | None = None
    stand_ins: list[tuple[Tensor, str]] | None = None
    end_hidden: Tensor | None = None

    def stand_for(self, meta: TensorMeta, name: str) -> Tensor:
        """Return a tensor in place of one that a module of another stage computes; it must not influence the result."""
        stand_in = meta.unknown(self.device, self.mesh)
        if self.stand_ins is None or not torch.is_grad_enabled() or not stand_in.is_floating_point():
            return stand_in
        self.stand_ins.append((stand_in.requires_grad_(), name))
        return stand_in.clone()  # not a leaf, which a model could not change in place


class Reached(BaseException):
    """Ends a forward after the stage's own blocks. Not an `Exception`: a model's own handlers must not catch it."""


class _Absent(nn.Module):
    """Replacement of a module of another stage. Keeps its attributes, which a model may read, but no tensor."""

    def __init__(self, name: str, original: nn.Module, flow: Flow) -> None:
        super().__init__()
        self._name, self._flow = name, flow
        for key, value in vars(original).items():
            if not key.startswith("_") and key != "training" and not _holds_tensors(value):
                self.__dict__[key] = value

    def extra_repr(self) -> str:
        return "on another stage"


class StandIn(_Absent):
    """Replacement of a module before the blocks, on a later stage."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return tensors with the shapes of the absent module's output."""
        flow = self._flow
        assert flow.boundary is not None
        outputs = flow.boundary.stand_ins.get(self._name) or [flow.boundary.hidden]
        output = outputs[min(flow.calls[self._name], len(outputs) - 1)]
        flow.calls[self._name] += 1
        return tree_map_only(TensorMeta, lambda one: flow.stand_for(one, self._name), output)


class PassOn(_Absent):
    """Replacement of a block of an earlier stage: returns its first argument, in the structure of a block's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument, and tensors with the shapes of the absent block's other results."""
        flow = self._flow
        assert flow.boundary is not None
        hidden = first_argument(args, kwargs)
        output = tree_map_only(TensorMeta, lambda one: flow.stand_for(one, self._name), flow.boundary.block_output)
        return tree_map_only(HiddenState, lambda _: hidden, output)


class Exit(_Absent):
    """Replacement of a block of a later stage or a module after the blocks: the first one called ends the forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the first argument to send, and end the forward."""
        self._flow.sent = first_argument(args, kwargs)
        raise Reached


class _Around(nn.Module):
    """Wrapper of a block that has the block's attributes."""

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
    """Wrapper of a stage's first block: passes it the received hidden state. On the first stage it serves the probe."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the received hidden state."""
        flow = self._flow
        if flow.received is not None:
            if args:
                args = (flow.received, *args[1:])
            else:
                kwargs = {**kwargs, next(iter(kwargs)): flow.received}
        output = self._entered_module(*args, **kwargs)
        if flow.probe is None:
            return output
        record_block(flow.probe, args, kwargs, output)
        raise Reached


class End(_Around):
    """Wrapper of the model's last block: splits the graph behind it if `flow.splits_graph` is set.

    What follows the blocks often ends in a fused loss whose backward can run only once. With the graph split, it does,
    while backward of the blocks runs in two halves.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and split the graph or record the hidden state if asked."""
        flow = self._flow
        output = self._entered_module(*args, **kwargs)
        leaves, spec = tree_flatten(output)
        hidden = leaves[0]
        if not isinstance(hidden, Tensor) or not hidden.requires_grad:
            return output
        assert flow.boundary is not None
        if flow.splits_graph and fits(hidden, flow.boundary):
            packed = pack(hidden, flow.boundary)
            flow.graph_split = GraphSplit(packed, packed.detach().requires_grad_())
            leaves[0] = unpack(flow.graph_split.leaf, flow.boundary, flow.mesh)
            hidden = packed
        if flow.stand_ins is not None:
            flow.end_hidden = hidden
        return tree_unflatten(leaves, spec)


def _holds_tensors(value: object) -> bool:
    """Return whether a value is or contains a tensor or a module."""
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value))
