"""Packing the hidden state into a regular tensor to send to the next stage, and unpacking it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_parallel.pipeline.boundary import Boundary, TensorMeta


def pack(hidden: Tensor, boundary: Boundary) -> Tensor:
    """Return the regular tensor to send for a hidden state.

    Raises:
        RuntimeError: If its shape, dtype or placements differ from those inferred.
    """
    if not fits(hidden, boundary):
        raise RuntimeError(
            f"blocks must keep the hidden state's shape, dtype and placements, {boundary.hidden}, but one returned "
            f"{TensorMeta.of(hidden)}"
        )
    packed: Tensor = _Leave.apply(_settled(hidden.to_local() if isinstance(hidden, DTensor) else hidden))
    return packed


def unpack(received: Tensor, boundary: Boundary, mesh: DeviceMesh) -> Tensor:
    """Return the hidden state from a received tensor; `mesh` is the tensor-parallel mesh."""
    hidden: Tensor = _Arrive.apply(received)
    meta = boundary.hidden
    if meta.placements is None:
        return hidden
    return DTensor.from_local(hidden, mesh, meta.placements, run_check=False, shape=meta.shape, stride=meta.stride)


def fits(hidden: Tensor, boundary: Boundary) -> bool:
    """Return whether a hidden state has the inferred shape, dtype and placements."""
    found, wanted = TensorMeta.of(hidden), boundary.hidden
    return (found.shape, found.dtype, found.placements) == (wanted.shape, wanted.dtype, wanted.placements)


class _Leave(torch.autograd.Function):
    """The identity on the tensor to send, never as a view: torch detaches a stage's output in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data  # shares memory, but is not a view for autograd

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Arrive(torch.autograd.Function):
    """The identity on the received tensor; makes its gradient contiguous, so that it can be sent back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _settled(grad)


def _settled(x: Tensor) -> Tensor:
    """Return `x` contiguous, and waited for if it is a subclass for a collective in flight."""
    return (x if type(x) is Tensor else x.clone()).contiguous()
