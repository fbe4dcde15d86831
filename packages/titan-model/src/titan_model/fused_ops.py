"""SwiGLU, RMSNorm and rotary embedding with hand-written gradients, for uncompiled code.

Under autograd each of these is a chain of operations that save their intermediate results for the backward pass, and
memory traffic costs more than arithmetic. With hand-written gradients they save only tensors that the model holds
anyway, and read and write memory fewer times. Under `torch.compile` the regular formulas are used: the compiler fuses
them itself.

torch 2.11: the compiler computes wrong gradients for these autograd functions, so the regular formulas must stay there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_model._torch_compat import silu_backward


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up` (Shazeer 2020, arXiv:2002.05202) of two tensors of the same shape."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last dim by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        eps: Added to the mean square.

    Returns:
        `[..., D]` in the dtype of `x`; under autocast in autocast's dtype, since matrix products read it next.
    """
    if torch.compiler.is_compiling():
        wide = x.float()
        return (wide * _inverse_rms(wide, eps) * weight).to(autocast_dtype(x))
    out: Tensor = _RMSNorm.apply(x, weight, eps, autocast_dtype(x))
    return out


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs `(x[i], x[i + Dh / 2])` by their angles, in fp32 (RoFormer, Su et al. 2021, in half-split layout).

    If there are angles for fewer dims than a head has, only its first dims are rotated, and paired among themselves.

    Args:
        x: Queries or keys `[B, S, H, Dh]`.
        rope: Cosine and sine, fp32 `[B or 1, S, 1, Dh / 2]`.

    Returns:
        `[B, S, H, Dh]` in the dtype of `x`.
    """
    width = 2 * rope[0].shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], rope), x[..., width:]), dim=-1)
    if torch.compiler.is_compiling():
        return _rotate_pairs(x, *rope, 1)
    out: Tensor = _Rotate.apply(x, *rope)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return silu_backward(grad * up, gate), F.silu(gate) * grad


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        inverse = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse * weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * inverse
        product = grad * normed
        weight_grad = product.flatten(0, -2).sum(0)
        # With n the normalized x: dx = inverse * (g w - n * mean(g w n)).
        mean = (product * weight).mean(-1, keepdim=True)
        x_grad = torch.addcmul(grad * weight, normed, mean, value=-1) * inverse
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_pairs(grad, cos, sin, -1), None, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    left = torch.addcmul(first * cos, second, sin, value=-direction)
    right = torch.addcmul(second * cos, first, sin, value=direction)
    return torch.cat((left, right), dim=-1).to(x.dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products read `x`: that of autocast if it is enabled, else that of `x`."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # raises for meta, which has no autocast
        return torch.get_autocast_dtype(device)
    return x.dtype
