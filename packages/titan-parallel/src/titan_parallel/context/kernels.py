"""Attention of some queries to some keys, with the log of each softmax's denominator.

That log makes results of different keys one: see `merge`. Backward takes it, and the output, of *all* keys: then the
gradients of the parts add up to those of the whole.

`kernel_for` chooses: torch's flash kernel for the CPU; on CUDA its flash kernel for bf16 and fp16, else the
memory-efficient one; `PLAIN`, which is right for every device, dtype and head dim but holds all scores, elsewhere.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads (`H` is a multiple), `S` queries, `T` keys, `Dh` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_HALF = (torch.bfloat16, torch.float16)
_CUDA_HEAD_DIM = 8  # what torch's kernels for CUDA want head dims to be a multiple of
_CUDA_FLASH_HEAD_DIM = 256  # the widest that its flash kernel takes
_EFFICIENT_ALIGNMENT = 32  # the memory-efficient kernel's logs are padded to a multiple of this


class Kernel(NamedTuple):
    """Two functions that compute attention.

    Attributes:
        forward: (q `[B, H, S, Dh]`, k `[B, Hkv, T, Dh]`, v as k, causal, scale) to (out as q, logs `[B, H, S]` in fp32
            or better). `causal` shows each query the keys up to its own place, with `T = S`; else it sees all.
        backward: (gradient of out, q, k, v, out, logs, causal, scale) to the gradients of q, k and v. `out` and `logs`
            are those over all keys that the queries see, these and others.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float],
        tuple[Tensor, Tensor, Tensor],
    ]


def kernel_for(q: Tensor) -> Kernel:
    """Return the best kernel for queries such as `q` and for its keys and values."""
    if q.device.type == "cpu" and q.dtype in _CPU_DTYPES:
        return _CPU
    if q.is_cuda and q.shape[-1] % _CUDA_HEAD_DIM == 0:
        flash = q.dtype in _HALF and q.shape[-1] <= _CUDA_FLASH_HEAD_DIM
        flash = flash and torch.cuda.get_device_capability(q.device) >= (8, 0)
        return _CUDA_FLASH if flash else _CUDA_EFFICIENT
    return PLAIN


def merge(out: Tensor, logs: Tensor, part: Tensor, part_logs: Tensor) -> None:
    """Add attention to further keys to `out` and `logs`, in place; zeros and -inf stand for no keys so far.

    Each result is weighed by its share of the denominators' sum (Milakov and Gimelshein 2018, arXiv:1805.02867).
    """
    total = torch.logaddexp(logs, part_logs)
    out.mul_((logs - total).exp()[..., None]).addcmul_(part, (part_logs - total).exp()[..., None])
    logs.copy_(total)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logs = flash(q, k, v, 0.0, causal, scale=scale)
    return out, logs


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = flash(grad, q, k, v, out, logs, 0.0, causal, scale=scale)
    return dq, dk, dv


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, logs, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, logs


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
    # Without dropout nothing reads the state of its random numbers.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    s, t = q.shape[2], k.shape[2]
    dq, dk, dv = flash(grad, q, k, v, out, logs.contiguous(), None, None, s, t, 0.0, causal, state, unused, scale=scale)
    return dq, dk, dv


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (_expanded(x, q.shape[1]) for x in (k, v))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out, logs, *_ = efficient(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, logs[..., : q.shape[2]]


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    heads = k.shape[1]
    k, v = (_expanded(x, q.shape[1]) for x in (k, v))
    logs = F.pad(logs, (0, -logs.shape[-1] % _EFFICIENT_ALIGNMENT), value=torch.inf)
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]  # no gradient of a bias
    dq, dk, dv, _ = efficient(grad, q, k, v, None, out, logs, state, state, 0.0, wanted, causal, scale=scale)
    return dq, *(torch.unflatten(x, 1, (heads, -1)).sum(2) for x in (dk, dv))


def _expanded(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scale)  # [B, Hkv, H / Hkv, S, T]
    logs = scores.logsumexp(-1)
    out = (scores - logs[..., None]).exp() @ v[:, :, None].to(scores.dtype)
    return out.flatten(1, 2).to(q.dtype), logs.flatten(1, 2)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(q, k, causal, scale)
    heads = (k.shape[1], -1)
    q_, grad_, out_ = (torch.unflatten(x, 1, heads).to(scores.dtype) for x in (q, grad, out))
    k_, v_ = (x[:, :, None].to(scores.dtype) for x in (k, v))
    shares = (scores - torch.unflatten(logs, 1, heads)[..., None]).exp()
    dv = (shares.mT @ grad_).sum(2)
    shares = shares * (grad_ @ v_.mT - (grad_ * out_).sum(-1, keepdim=True)) * scale
    return (shares @ k_).flatten(1, 2).to(q.dtype), (shares.mT @ q_).sum(2).to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores: Tensor = torch.unflatten(q, 1, (k.shape[1], -1)).to(dtype) @ k[:, :, None].to(dtype).mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


PLAIN = Kernel(_plain_forward, _plain_backward)
_CPU = Kernel(_cpu_forward, _cpu_backward)
_CUDA_FLASH = Kernel(_flash_forward, _flash_backward)
_CUDA_EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
