"""Attention from queries to some of their keys, together with the log of each softmax's denominator.

With these logs results over different keys can be merged, see `merge`. Backward takes the output and logs over *all*
keys; the gradients of the parts then add up to those of the full attention.

`kernel_for` selects: torch's flash kernel for the CPU; on CUDA its flash kernel for bf16 and fp16, else the
memory-efficient one; elsewhere `UNFUSED`, which supports every device, dtype and head dim but holds all scores.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads (`H` is a multiple), `S` queries, `T` keys, `Dh` head dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_parallel._torch_compat import ATEN

Inputs = tuple[Tensor, Tensor, Tensor]
"""q `[B, H, S, Dh]`, k `[B, Hkv, T, Dh]`, v `[B, Hkv, T, Dh]`; or their gradients."""

Result = tuple[Tensor, Tensor]
"""The output `[B, H, S, Dh]` and its logs `[B, H, S]`, in fp32 or wider."""

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_HALF = (torch.bfloat16, torch.float16)
_CUDA_HEAD_DIM = 8  # torch's kernels for CUDA require head dims to be a multiple of this
_CUDA_FLASH_HEAD_DIM = 256  # the largest that its flash kernel supports
_EFFICIENT_ALIGNMENT = 32  # the memory-efficient kernel's logs are padded to a multiple of this


class Forward(Protocol):
    """Compute attention. `causal`: each query attends to keys up to its own position, with `T = S`; else to all."""

    def __call__(self, inputs: Inputs, *, causal: bool, scale: float) -> Result: ...  # noqa: D102


class Backward(Protocol):
    """Compute the gradients of `inputs` from `grad`, that of the output; `result` is over all keys of the queries."""

    def __call__(self, grad: Tensor, inputs: Inputs, result: Result, *, causal: bool, scale: float) -> Inputs: ...  # noqa: D102


class Kernel(NamedTuple):
    """A forward and the backward that belongs to it."""

    forward: Forward
    backward: Backward


def kernel_for(q: Tensor) -> Kernel:
    """Return the fastest kernel that supports queries such as `q` and their keys and values."""
    if q.device.type == "cpu" and q.dtype in _CPU_DTYPES:
        return _CPU
    if q.is_cuda and q.shape[-1] % _CUDA_HEAD_DIM == 0:
        flash = q.dtype in _HALF and q.shape[-1] <= _CUDA_FLASH_HEAD_DIM
        flash = flash and torch.cuda.get_device_capability(q.device) >= (8, 0)
        return _CUDA_FLASH if flash else _CUDA_EFFICIENT
    return UNFUSED


def merge(result: Result, part: Result) -> None:
    """Merge attention to further keys into `result`, in place; an output of zeros with logs of -inf means no keys.

    Each output is weighted by its share of the sum of denominators (Milakov and Gimelshein 2018, arXiv:1805.02867).
    """
    (out, logs), (part_out, part_logs) = result, part
    total = torch.logaddexp(logs, part_logs)
    out.mul_((logs - total).exp()[..., None]).addcmul_(part_out, (part_logs - total).exp()[..., None])
    logs.copy_(total)


def _cpu_forward(inputs: Inputs, *, causal: bool, scale: float) -> Result:
    out, logs = ATEN._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, causal, scale=scale)
    return out, logs


def _cpu_backward(grad: Tensor, inputs: Inputs, result: Result, *, causal: bool, scale: float) -> Inputs:
    flash = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = flash(grad, *inputs, *result, 0.0, causal, scale=scale)
    return dq, dk, dv


def _flash_forward(inputs: Inputs, *, causal: bool, scale: float) -> Result:
    out, logs, *_ = ATEN._scaled_dot_product_flash_attention(*inputs, 0.0, causal, scale=scale)
    return out, logs


def _flash_backward(grad: Tensor, inputs: Inputs, result: Result, *, causal: bool, scale: float) -> Inputs:
    (q, k, v), (out, logs) = inputs, result
    flash = ATEN._scaled_dot_product_flash_attention_backward
    # Without dropout the state of the random number generator is not read.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    s, t = q.shape[2], k.shape[2]
    dq, dk, dv = flash(grad, q, k, v, out, logs.contiguous(), None, None, s, t, 0.0, causal, state, unused, scale=scale)
    return dq, dk, dv


def _efficient_forward(inputs: Inputs, *, causal: bool, scale: float) -> Result:
    q, k, v = inputs
    k, v = (_expanded(x, q.shape[1]) for x in (k, v))
    want_logs = True
    out, logs, *_ = ATEN._scaled_dot_product_efficient_attention(q, k, v, None, want_logs, 0.0, causal, scale=scale)
    return out, logs[..., : q.shape[2]]


def _efficient_backward(grad: Tensor, inputs: Inputs, result: Result, *, causal: bool, scale: float) -> Inputs:
    (q, k, v), (out, logs) = inputs, result
    efficient = ATEN._scaled_dot_product_efficient_attention_backward
    heads = k.shape[1]
    k, v = (_expanded(x, q.shape[1]) for x in (k, v))
    logs = F.pad(logs, (0, -logs.shape[-1] % _EFFICIENT_ALIGNMENT), value=torch.inf)
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]  # no gradient of a bias
    dq, dk, dv, _ = efficient(grad, q, k, v, None, out, logs, state, state, 0.0, wanted, causal, scale=scale)
    return dq, *(torch.unflatten(x, 1, (heads, -1)).sum(2) for x in (dk, dv))


def _expanded(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _unfused_forward(inputs: Inputs, *, causal: bool, scale: float) -> Result:
    q, k, v = inputs
    scores = _scores(q, k, causal=causal, scale=scale)  # [B, Hkv, H / Hkv, S, T]
    logs = scores.logsumexp(-1)
    out = (scores - logs[..., None]).exp() @ v[:, :, None].to(scores.dtype)
    return out.flatten(1, 2).to(q.dtype), logs.flatten(1, 2)


def _unfused_backward(grad: Tensor, inputs: Inputs, result: Result, *, causal: bool, scale: float) -> Inputs:
    (q, k, v), (out, logs) = inputs, result
    scores = _scores(q, k, causal=causal, scale=scale)
    heads = (k.shape[1], -1)
    q_, grad_, out_ = (torch.unflatten(x, 1, heads).to(scores.dtype) for x in (q, grad, out))
    k_, v_ = (x[:, :, None].to(scores.dtype) for x in (k, v))
    shares = (scores - torch.unflatten(logs, 1, heads)[..., None]).exp()
    dv = (shares.mT @ grad_).sum(2)
    shares = shares * (grad_ @ v_.mT - (grad_ * out_).sum(-1, keepdim=True)) * scale
    return (shares @ k_).flatten(1, 2).to(q.dtype), (shares.mT @ q_).sum(2).to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, *, causal: bool, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores: Tensor = torch.unflatten(q, 1, (k.shape[1], -1)).to(dtype) @ k[:, :, None].to(dtype).mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


UNFUSED = Kernel(_unfused_forward, _unfused_backward)
_CPU = Kernel(_cpu_forward, _cpu_backward)
_CUDA_FLASH = Kernel(_flash_forward, _flash_backward)
_CUDA_EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
