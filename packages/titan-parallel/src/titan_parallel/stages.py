"""A stage of a pipeline: the model itself, with what is not its own left out.

Every rank of a pipeline reads the same rows, so each stage runs the model's own forward with all its arguments: masks,
rotary tables and the like are computed where they are needed, and stages exchange the hidden state alone, the first
argument of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_parallel.errors import LayoutError
from titan_parallel.splittable import is_splittable
from titan_parallel.stage_boundary import Boundary, Like, Probe, noting_outputs, template
from titan_parallel.stage_modules import Flow, Reached


class Arguments(Protocol):
    """What a model is called with."""

    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102

    @property
    def kwargs(self) -> Any: ...  # noqa: D102


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
        except Reached:
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
        probe = Probe()
        with noting_outputs(self.part, self._before, probe.stand_ins):
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
        return Boundary(Like.of(probe.hidden), local.shape, probe.stand_ins, template(probe.output))

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
