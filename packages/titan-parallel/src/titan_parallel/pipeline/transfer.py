"""The hidden state on its way from stage to stage: packed into a plain tensor and unpacked again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_parallel.pipeline.boundary import Boundary, Like


def pack(hidden: Tensor, boundary: Boundary) -> Tensor:
    """Return what to send of a hidden state.

    Raises:
        RuntimeError: If it is not of the shape, dtype and layout that the stages agreed on.
    """
    if not fits(hidden, boundary):
        raise RuntimeError(
            f"blocks have to keep the hidden state's shape and dtype, {boundary.hidden}, but return {Like.of(hidden)}"
        )
    left: Tensor = _Leave.apply(_settled(hidden.to_local() if isinstance(hidden, DTensor) else hidden))
    return left


def unpack(received: Tensor, boundary: Boundary, mesh: DeviceMesh) -> Tensor:
    """Return the hidden state that was received; `mesh` is the tensor-parallel one."""
    hidden: Tensor = _Arrive.apply(received)
    like = boundary.hidden
    if like.placements is None:
        return hidden
    return DTensor.from_local(hidden, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride)


def fits(hidden: Tensor, boundary: Boundary) -> bool:
    """Whether a hidden state is of the shape, dtype and layout that the stages agreed on."""
    found, wanted = Like.of(hidden), boundary.hidden
    return (found.shape, found.dtype, found.placements) == (wanted.shape, wanted.dtype, wanted.placements)


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
