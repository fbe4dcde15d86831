"""The decoder: Llama 2 and Llama 3 from one config.

Shapes: `B` batch, `S` sequence, `D` model dim, `H` query heads, `Hkv` key/value heads, `Dh` head dim, `V` vocabulary.

Nothing here knows of ranks or meshes, and there are no buffers: rotary angles are computed from the positions in each
forward, so a model built on the meta device needs its parameters filled in and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_model.config import DecoderConfig
from titan_model.rope import inverse_frequencies, rotate, rotation

Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        kv_dim = config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """Attend within each sequence.

        Args:
            x: `[B, S, D]`.
            rope: Cosine and sine of the rotary angles.
            mask: Bool `[B, 1, S, S]`, true where a query may look; None is plain causal.

        Returns:
            `[B, S, D]`.
        """
        # Heads are counted from the projections' width, not the config: under tensor parallelism each rank holds some.
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, H, Dh]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, Hkv, Dh]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)  # [B, H, S, Dh]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        out = out.transpose(1, 2).flatten(2)  # [B, S, H * Dh]
        projected: Tensor = self.o_proj(out)  # [B, S, D]
        return projected


class FeedForward(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself: `[B, S, D]` to `[B, S, D]`."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One transformer layer: attention, then feed-forward, each behind a norm and a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """Apply the block to `x` `[B, S, D]`; see `Attention.forward` for the others."""
        x = x + self.attn(self.attn_norm(x), rope, mask)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: Its shape. Build it under `torch.device("meta")` to allocate nothing.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        # A dict, so that a block keeps its name when others are left out.
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Return next-token logits.

        Args:
            tokens: Integers `[B, S]`.
            positions: Integers `[B, S]`, restarting at each document; None counts from 0.
            document_ids: Integers `[B, S]`; tokens attend only within their own document. None: one per row.

        Returns:
            `[B, S, V]`, in the dtype of the parameters.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, tokens.device)
        rope = rotation(positions, frequencies)
        mask = None if document_ids is None else document_mask(document_ids)
        x = self.embed(tokens)  # [B, S, D]
        for block in self.layers.values():
            x = block(x, rope, mask)
        logits: Tensor = self.head(self.norm(x))  # [B, S, V]
        return logits


def document_mask(document_ids: Tensor) -> Tensor:
    """Return which positions each query may look at: its own document, up to itself.

    Args:
        document_ids: Integers `[B, S]`.

    Returns:
        Bool `[B, 1, S, S]`, query by key.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def build(config: DecoderConfig, device: torch.device | str = "meta") -> Decoder:
    """Build a decoder.

    Args:
        config: Its shape.
        device: Where the parameters lie. On `meta` (the default) nothing is allocated; elsewhere they hold torch's
            own initialisation until `init_parameters` or a checkpoint fills them. (torch's `to_empty` takes tied
            weights apart: set `model.head.weight = model.embed.weight` after it.)

    Returns:
        The model.
    """
    with torch.device(device):
        return Decoder(config)
