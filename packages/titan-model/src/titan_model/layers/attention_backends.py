"""The attention core: scaled dot-product attention by the back-end that the mask was prepared for.

Called by `layers.attention`. titan-parallel replaces `AttentionCore` under context parallelism.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from titan_model.layers.masks import Mask
from titan_model.layers.varlen_cpu import document_attention


class AttentionCore(nn.Module):
    """Scaled dot-product attention, by the back-end that the mask was prepared for. Has no parameters."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """Compute attention. Keys and values are not repeated for grouped queries.

        Args:
            q: `[B, H, S, Dh]`.
            k: `[B, Hkv, T, Dh]`.
            v: `[B, Hkv, T, Dh]`.
            mask: Which keys a query attends to; None: all earlier ones (causal), with `T = S`.

        Returns:
            `[B, H, S, Dh]`.
        """
        grouped = q.shape[1] != k.shape[1]
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if mask.boundaries is not None:
            flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [B * S, H, Dh]
            out = document_attention(flat[0], flat[1], flat[2], mask.boundaries, q.shape[2], mask.window)
            return out.reshape(q.shape[0], q.shape[2], *out.shape[1:]).transpose(1, 2)
        if mask.blocks is not None:
            return _flex(q, k, v, mask.blocks)
        if q.shape[2] == 1 and grouped:
            # Not every kernel that accepts a mask supports grouped heads, so heads that share keys become queries.
            shared = q.view(*k.shape[:2], -1, q.shape[3])  # [B, Hkv, H / Hkv, Dh]
            return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask.allowed).view_as(q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, enable_gqa=grouped)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    # Uncompiled, FlexAttention materializes all scores. Inside compiled code it is compiled with the rest.
    compile_here = q.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled_flex() if compile_here else flex_attention
    out: Tensor = attend(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return out


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled
