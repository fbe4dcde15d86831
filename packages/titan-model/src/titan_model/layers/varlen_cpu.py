"""Causal attention within documents that lie one after the other, each computed by itself.

On CUDA this is torch's variable-length flash attention. The CPU has no such kernel, but it has a flash kernel for one
sequence, which is called document by document here: no query ever meets a key of another document, so that packing
saves work instead of masking it away, and each document gets the very sums it would get alone.

The operators are registered with torch, so that compiled code takes them as they are, whatever the documents' lengths.

Shapes: `T` tokens of all rows together, `H` query heads, `Hkv` key/value heads, `Dh` head dim, `N` documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document_attention(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    """Attend causally within each document.

    Args:
        q: `[T, H, Dh]`.
        k: `[T, Hkv, Dh]`.
        v: `[T, Hkv, Dh]`.
        boundaries: int32 `[N + 1]`: where each document begins, and `T`. (On the CPU `T` may be repeated.)
        longest: No document has more tokens.

    Returns:
        `[T, H, Dh]`.
    """
    if q.is_cuda:
        return _varlen(q, k, v, boundaries, longest)
    out: Tensor = _attend(q, k, v, boundaries)[0]
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Newer releases want to be told of grouped heads; older ones have no such argument and take them as they come.
    attend: Any = varlen_attn
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    causal = (-1, 0)
    out: Tensor = attend(q, k, v, boundaries, boundaries, longest, longest, window_size=causal, **grouped)
    return out


@torch.library.custom_op("titan_model::document_attention", mutates_args=(), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output `[T, H, Dh]` and the log of each softmax's denominator, fp32 `[T, H]`."""
    out, log_sums = _attend_shapes(q, k, v, boundaries)
    for document in _slices(boundaries):
        part, log_sum = _flash(
            _heads_first(q[document]), _heads_first(k[document]), _heads_first(v[document]), 0.0, True
        )
        out[document], log_sums[document] = part[0].transpose(0, 1), log_sum[0].transpose(0, 1)
    return out, log_sums


@_attend.register_fake
def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    # The kernel gives its sums in fp32, or in fp64 for fp64.
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("titan_model::document_attention_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward_shapes(grad, q, k, v, boundaries, out, log_sums)
    for document in _slices(boundaries):
        inputs = (_heads_first(x[document]) for x in (grad, q, k, v, out, log_sums))
        for whole, part in zip(gradients, _flash_backward(*inputs, 0.0, True), strict=True):
            whole[document] = part[0].transpose(0, 1)
    return gradients


@_attend_backward.register_fake
def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    out, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    ctx.save_for_backward(*inputs, out, log_sums)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    gradients: tuple[Tensor, Tensor, Tensor] = _attend_backward(grad, *ctx.saved_tensors)
    return *gradients, None


_attend.register_autograd(_differentiate, setup_context=_save)


def _slices(boundaries: Tensor) -> Iterator[slice]:
    ends = torch.unique_consecutive(boundaries).tolist()
    return map(slice, ends[:-1], ends[1:])


def _heads_first(x: Tensor) -> Tensor:
    """Turn one document's `[n, H, ...]` into a batch of one, `[1, H, n, ...]`."""
    return x.transpose(0, 1)[None]
