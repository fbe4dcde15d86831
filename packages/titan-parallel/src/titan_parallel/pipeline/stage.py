"""A stage of a pipeline: the model itself, with the modules of other stages replaced (`stage_modules`).

All ranks of a pipeline get the same sequences, so each stage runs the model's own forward with all arguments: masks,
rotary tables and the like are computed where they are needed, and stages exchange only the hidden state, the first
argument of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_parallel.errors import LayoutError
from titan_parallel.pipeline.boundary import Boundary, Probe, TensorMeta, recording_outputs, template
from titan_parallel.pipeline.stage_modules import Flow, Reached
from titan_parallel.pipeline.transfer import pack, unpack


class Arguments(Protocol):
    """The arguments of a model."""

    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102

    @property
    def kwargs(self) -> Any: ...  # noqa: D102


class Stage(nn.Module):
    """One stage, as torch's pipeline schedules call it: hidden state in, hidden state or loss out.

    Attributes:
        part: The model, with modules of other stages replaced.
        flow: State that its modules share.
        is_last: Whether it ends with the loss.
        microbatch: The arguments of the next call; set before each call.
        finish: Computes the result of the last stage, a scalar, from (output of the model, microbatch).
        splits_backward: Whether its backward can run in two halves; None before the dry run.
    """

    microbatch: Arguments
    finish: Callable[[Any, Any], Tensor] | None = None
    splits_backward: bool | None = None

    def __init__(self, part: nn.Module, flow: Flow, before: Sequence[str], *, is_last: bool) -> None:
        super().__init__()
        self.part = part
        self.flow = flow
        self.is_last = is_last
        self._before = tuple(before)

    def forward(self, received: Tensor | None = None) -> Tensor:
        """Return the hidden state to send, or the loss, from the received one (None on the first stage)."""
        flow = self.flow
        flow.calls.clear()
        flow.end_hidden = flow.graph_split = None
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
            raise RuntimeError("the model's forward returned without calling the blocks of later pipeline stages")
        return self.finish(output, self.microbatch)

    def infer_boundary(self) -> Boundary:
        """Run the first stage's forward up to the first block, and return what stages exchange.

        Raises:
            LayoutError: If stages would have to exchange more than the hidden state.
        """
        probe = Probe()
        with recording_outputs(self.part, self._before, probe.stand_ins):
            self.flow.probe = probe
            try:
                self()
            finally:
                self.flow.probe = None
        if probe.complaint:
            raise LayoutError(probe.complaint)
        if probe.hidden is None:
            raise LayoutError(
                "the model's forward returned without calling its first block, which the plan names; set pp=1"
            )
        local = probe.hidden.to_local() if isinstance(probe.hidden, DTensor) else probe.hidden
        return Boundary(TensorMeta.of(probe.hidden), local.shape, probe.stand_ins, template(probe.output))
