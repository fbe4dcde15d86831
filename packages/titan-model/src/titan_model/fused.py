"""Elementary steps of a block, with gradients written out.

Left to autograd, each of these is a string of operations that keep their intermediate results until the backward pass.
Where nothing compiles them into one kernel, memory traffic then costs more than arithmetic. Written out, they keep
nothing that the model does not hold anyway, and take a third of the passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up` (Shazeer 2020, arXiv:2002.05202) of two tensors of one shape."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm the last dim by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        eps: Added to the mean square.

    Returns:
        `[..., D]` in the dtype of `x`; under autocast in its dtype, as matrix products read it next.
    """
    out: Tensor = _RMSNorm.apply(x, weight, eps, autocast_dtype(x))
    return out


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs `(x[i], x[i + Dh / 2])` by their angles, in fp32 (RoFormer, Su et al. 2021, in half-split layout).

    Args:
        x: Queries or keys `[B, S, H, Dh]`.
        rope: Cosine and sine, fp32 `[B or 1, S, 1, Dh / 2]`.

    Returns:
        `[B, S, H, Dh]` in the dtype of `x`.
    """
    out: Tensor = _Rotate.apply(x, *rope)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * inverse
        product = grad * normed
        weight_grad = product.flatten(0, -2).sum(0)
        # With n the normed x: dx = inverse * (g w - n * mean(g w n)).
        mean = product.mul_(weight).mean(-1, keepdim=True)
        x_grad = torch.addcmul(grad * weight, normed, mean, value=-1).mul_(inverse)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    out = wide * torch.cat((cos, cos), dim=-1)
    left, right = out.chunk(2, dim=-1)
    left.addcmul_(second, sin, value=-direction)
    right.addcmul_(first, sin, value=direction)
    return out.to(x.dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products read `x`: that of autocast where it is on, else its own."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
