"""The decoder: every family from one config.

Shapes: `B` batch, `S` sequence, `D` model dim, `H` query heads, `Hkv` key/value heads, `Dh` head dim, `V` vocabulary.

Nothing here knows of ranks or meshes, and nothing but parameters has to be filled in after a start on the meta device:
rotary angles are computed from the positions in each forward.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from titan_model.config import DecoderConfig
from titan_model.layers.attention import Attention, Rope
from titan_model.layers.feed_forward import FeedForward
from titan_model.layers.kv_cache import KVCache, LayerCache
from titan_model.layers.lm_head import Head
from titan_model.layers.masks import Mask, make_mask
from titan_model.layers.norms import make_norm
from titan_model.layers.rope import inverse_frequencies, rotation
from titan_model.loss import LossSums
from titan_model.moe.layer import MoE


class Block(nn.Module):
    """One transformer layer: attention, then feed-forward, each behind a norm and a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = MoE(config) if config.has_experts(layer) else FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, rope: Rope, mask: Mask | None, cache: LayerCache | None = None) -> Tensor:
        """Apply the block to `x` `[B, S, D]`; see `Attention.forward` for the others."""
        x = x + self.attn(self.attn_norm(x), rope, mask, cache)
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
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layers)})
        self.norm = make_norm(config)
        self.head = Head(config.dim, config.vocab_size)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight

    @overload
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = ...,
        document_ids: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(self, tokens: Tensor, *, cache: KVCache) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = ...,
        document_ids: Tensor | None = ...,
        *,
        labels: Tensor,
        source_ids: Tensor | None = ...,
        n_sources: int = ...,
        z_loss: float = ...,
    ) -> LossSums: ...

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        source_ids: Tensor | None = None,
        n_sources: int = 1,
        z_loss: float = 0.0,
        cache: KVCache | None = None,
    ) -> Tensor | LossSums:
        """Return next-token logits or, given labels, the loss without ever holding all logits.

        Args:
            tokens: Integers `[B, S]`.
            positions: Integers `[B, S]`, restarting at each document; None counts from 0.
            document_ids: Integers `[B, S]`; tokens attend only within their own document. None: one per row.
            labels: Integers `[B, S]`, already shifted; -100 is not scored.
            source_ids: Integers `[B]`: which of `n_sources` sources each row's loss is summed under.
            n_sources: How many sums of the loss are kept apart.
            z_loss: Coefficient of the z-loss; see `linear_cross_entropy`.
            cache: Keys and values of earlier tokens, to which those of `tokens` are added; tells the positions.

        Returns:
            Logits `[B, S, V]` in the dtype of the parameters, or the sums of the loss. With a cache, the logits after
            each row's last token alone, `[B, 1, V]`.
        """
        mask = None
        if cache is not None:
            positions, mask = cache.place(tokens)
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        config = self.config
        frequencies = inverse_frequencies(
            config.attention_head_dim, config.rope_theta, config.rope_scaling, tokens.device
        )
        rope = rotation(positions, frequencies)
        x = self.embed(tokens)  # [B, S, D]
        if cache is None:
            mask = make_mask(config, document_ids, x)
        for name, block in self.layers.items():
            x = block(x, rope, mask, None if cache is None else cache.layers[name])
        if cache is not None:
            x = cache.newest(x)  # the only ones that have a next token to predict
        x = self.norm(x)
        if labels is None:
            logits: Tensor = self.head(x)  # [B, S, V]
            return logits
        loss: LossSums = self.head(x, labels=labels, source_ids=source_ids, n_sources=n_sources, z_loss=z_loss)
        return loss


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
