"""Causal attention within packed documents, each computed separately (the back-end `varlen`).

Called by `attention_backends`. On CUDA this is torch's variable-length flash attention. The CPU has no such kernel, but
a flash kernel for one sequence, which is called here for each document: no query meets a key of another document, so
packing saves work that a mask would waste, and each document gets bitwise the result that it would get alone.

The CPU operators are registered with torch, so that `torch.compile` does not trace into them and the documents' lengths
cause no recompilation. Their tensors are separate arguments because operators accept no dataclasses.

Shapes: `T` tokens of all sequences together, `H` query heads, `Hkv` key/value heads, `Dh` head dim, `N` documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titan_model._torch_compat import cpu_flash_attention, cpu_flash_attention_backward, cuda_varlen_attention


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, window: int | None = None
) -> Tensor:
    """Compute causal attention within each document.

    Args:
        q: `[T, H, Dh]`.
        k: `[T, Hkv, Dh]`.
        v: `[T, Hkv, Dh]`.
        boundaries: int32 `[N + 1]`: where each document starts, then `T`. (On the CPU `T` may be repeated.)
        longest: Upper bound of the tokens of one document.
        window: Number of keys that a query attends to at most; None for all of its document.

    Returns:
        `[T, H, Dh]`.
    """
    if q.is_cuda:
        return cuda_varlen_attention(q, k, v, boundaries, longest, window)
    out: Tensor = _attend(q, k, v, boundaries, 0 if window is None else window)[0]
    return out


@torch.library.custom_op("titan_model::document_attention", mutates_args=(), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the output `[T, H, Dh]` and the log of each softmax's denominator, fp32 `[T, H]`; window 0 is none."""
    out, log_sums = _attend_shapes(q, k, v, boundaries, window)
    for document in _slices(boundaries):
        part, log_sum = cpu_flash_attention(
            _heads_first(q[document]), _heads_first(k[document]), _heads_first(v[document]), _added(document, window, q)
        )
        out[document], log_sums[document] = part[0].transpose(0, 1), log_sum[0].transpose(0, 1)
    return out, log_sums


@_attend.register_fake
def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, window: int) -> tuple[Tensor, Tensor]:
    # The kernel returns the log-sums in fp32, or in fp64 for fp64 inputs.
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("titan_model::document_attention_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, window: int, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward_shapes(grad, q, k, v, boundaries, window, out, log_sums)
    for document in _slices(boundaries):
        added = _added(document, window, q)
        inputs = (_heads_first(x[document]) for x in (grad, q, k, v, out, log_sums))
        for gradient, part in zip(gradients, cpu_flash_attention_backward(*inputs, added=added), strict=True):
            gradient[document] = part[0].transpose(0, 1)
    return gradients


@_attend_backward.register_fake
def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, window: int, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    out, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, out, log_sums)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, log_sums = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor, Tensor] = _attend_backward(grad, *inputs, ctx.window, out, log_sums)
    return *gradients, None, None


_attend.register_autograd(_differentiate, setup_context=_save)


def _slices(boundaries: Tensor) -> Iterator[slice]:
    ends = torch.unique_consecutive(boundaries).tolist()
    return map(slice, ends[:-1], ends[1:])


def _added(document: slice, window: int, q: Tensor) -> Tensor | None:
    """Return what is added to the scores of a document that is longer than the window; None for causal attention."""
    length = document.stop - document.start
    if not window or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    return torch.zeros(length, length, dtype=q.dtype).masked_fill(~seen, -math.inf)


def _heads_first(x: Tensor) -> Tensor:
    """Reshape one document's `[n, H, ...]` to a batch of one, `[1, H, n, ...]`."""
    return x.transpose(0, 1)[None]
