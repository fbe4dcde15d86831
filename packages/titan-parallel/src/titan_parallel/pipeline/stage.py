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
from titan_parallel.pipeline.boundary import Boundary, Like, Probe, noting_outputs, template
from titan_parallel.pipeline.stage_modules import Flow, Reached
from titan_parallel.pipeline.transfer import pack, unpack


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
        is_last: Whether it ends with the loss.
        microbatch: What to compute next; set before each call.
        finish: Makes the result of the last stage: (output of the model, microbatch) to a scalar.
        splits_backward: Whether its backward can be run in two halves; None until it was found out.
    """

    microbatch: Arguments
    finish: Callable[[Any, Any], Tensor] | None = None
    splits_backward: bool | None = None

    def __init__(self, part: nn.Module, flow: Flow, before: Sequence[str], is_last: bool) -> None:
        super().__init__()
        self.part = part
        self.flow = flow
        self.is_last = is_last
        self._before = tuple(before)

    def forward(self, received: Tensor | None = None) -> Tensor:
        """Compute the microbatch from what was received (but on the first stage) to what is to be sent, or the loss."""
        flow = self.flow
        flow.calls.clear()
        flow.ended = flow.parting = None
        if received is not None:
            assert flow.boundary is not None
            flow.received = unpack(received, flow.boundary, flow.mesh)
        try:
            output = self.part(*self.microbatch.args, **self.microbatch.kwargs)
        except Reached:
            hidden, flow.sent = flow.sent, None
            if hidden is None:
                return torch.zeros(())
            assert flow.boundary is not None
            return pack(hidden, flow.boundary)
        finally:
            flow.received = None
        if not self.is_last or self.finish is None:
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
