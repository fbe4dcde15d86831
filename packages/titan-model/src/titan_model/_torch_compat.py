"""Every private or version-dependent PyTorch function that titan_model uses, so that a release of it breaks one file.

titan_model supports torch 2.11 and later. Each entry says what it replaces, in which versions it was checked, and when
it can be removed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# torch 2.11 to 2.15: the kernels behind `F.scaled_dot_product_attention` on the CPU. The public function does not
# return the log of each softmax's denominator, which the backward kernel needs. Remove these when
# torch.nn.attention.varlen has a CPU kernel.
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def local_shape_and_offset(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this rank's shard and where in the full tensor it starts.

    torch 2.11 to 2.15: there is no public function for it. `torch.distributed.tensor._utils` has the one that torch's
    own checkpoints use. Remove this when torch exports one.
    """
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def cpu_flash_attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute causal attention of `[B, H, S, Dh]` on the CPU.

    Args:
        q: `[B, H, S, Dh]`.
        k: `[B, Hkv, S, Dh]`.
        v: `[B, Hkv, S, Dh]`.
        added: `[S, S]` in the dtype of `q`, added to the scores in the place of the causal mask; None: causal.

    Returns:
        The output and the log of each softmax's denominator `[B, H, S]`.
    """
    out, log_sums = _cpu_flash(q, k, v, dropout_p=0.0, is_causal=added is None, attn_mask=added)
    return out, log_sums


def cpu_flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, *, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v` of `cpu_flash_attention`."""
    grad_q, grad_k, grad_v = _cpu_flash_backward(
        grad, q, k, v, out, log_sums, dropout_p=0.0, is_causal=added is None, attn_mask=added
    )
    return grad_q, grad_k, grad_v


def cuda_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, window: int | None
) -> Tensor:
    """Attend causally within each document, by torch's variable-length flash attention for CUDA.

    torch 2.11: `varlen_attn` has no argument `enable_gqa` and accepts fewer key/value heads than query heads as they
    come; later releases require `enable_gqa=True` for that. Remove the check when 2.11 is no longer supported.
    """
    # Imported here: it loads torch._dynamo, which takes seconds, and only CUDA needs it.
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    reach = (-1 if window is None else window - 1, 0)  # keys before a query, and after it
    out: Tensor = attend(q, k, v, boundaries, boundaries, longest, longest, window_size=reach, **grouped)
    return out


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of `F.silu(x)`, in one kernel.

    torch 2.11 to 2.15: autograd calls this operator, but no public function exposes it.
    """
    out: Tensor = torch.ops.aten.silu_backward(grad, x)
    return out


def assert_async(condition: Tensor, message: str) -> None:
    """Raise RuntimeError if a bool scalar is false: on the CPU at once, on CUDA on the device, without waiting.

    torch 2.11 to 2.15: the only function that does this without a synchronization; CUDA prints up to 255 characters
    of the message. It is documented but has a private name. Remove this when torch exports it under a public one.
    """
    torch._assert_async(condition, message)
