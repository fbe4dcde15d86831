"""The attention module of a block: projections, rotary positions, key/value cache, and the attention core."""

from __future__ import annotations

import math

from torch import Tensor, nn

from titan_model.config import DecoderConfig
from titan_model.fused_ops import rotate
from titan_model.layers.attention_backends import AttentionCore
from titan_model.layers.kv_cache import LayerCache
from titan_model.layers.masks import Mask
from titan_model.layers.norms import make_head_norm

Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and, if `qk_norm` is set, normalized queries and keys.

    Args:
        config: The decoder's shape.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        q_dim, kv_dim = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = make_head_norm(config) if config.qk_norm else None
        self.k_norm = make_head_norm(config) if config.qk_norm else None
        # The core divides scores by the square root of the width of a head.
        multiplier = config.attention_multiplier
        self.query_scale = 1.0 if multiplier is None else multiplier * math.sqrt(self.head_dim)
        # A separate module, so that context parallelism can replace it.
        self.core = AttentionCore()

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask | None, cache: LayerCache | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            x: `[B, S, D]`.
            rope: Cosine and sine of the rotary angles; None: no rotary positions.
            mask: Which keys a query attends to; None: all earlier ones (causal).
            cache: Keys and values of earlier positions, to which those of `x` are added; None: no cache.

        Returns:
            `[B, S, D]`.
        """
        # The number of heads comes from the projections' width, since tensor parallelism splits them over ranks.
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, H, Dh]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, Hkv, Dh]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)  # under autocast a norm may return fp32
        if self.query_scale != 1:
            q = q * self.query_scale
        q = (q if rope is None else rotate(q, rope)).transpose(1, 2)  # [B, H, S, Dh]
        if cache is None:
            k, v = (k if rope is None else rotate(k, rope)).transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, S, Dh]
        else:
            k, v = cache.extend(k, v, rope, None if mask is None else mask.window)  # [B, Hkv, T, Dh]
        out = self.core(q, k, v, mask).transpose(1, 2).flatten(2)  # [B, S, H * Dh]
        projected: Tensor = self.o_proj(out)  # [B, S, D]
        return projected
