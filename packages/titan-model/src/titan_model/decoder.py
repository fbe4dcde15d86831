"""The decoder module: every model family from one config.

`build` is the entry point. `Decoder` joins the modules of `layers` and `moe`; `convert` and `generation` use it.

Nothing here knows about ranks or meshes. After construction on the meta device only parameters and buffers have to be
filled: rotary angles are computed from the positions in each forward.

Shapes: `B` batch, `S` sequence, `D` model dim, `H` query heads, `Hkv` key/value heads, `Dh` head dim, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import overload

import torch
from torch import Tensor, nn

from titan_model.companions import Companions
from titan_model.config import DecoderConfig
from titan_model.layers.attention import Attention, Rope
from titan_model.layers.feed_forward import FeedForward
from titan_model.layers.kv_cache import KVCache, LayerCache
from titan_model.layers.lm_head import Head
from titan_model.layers.masks import Mask, make_masks
from titan_model.layers.norms import make_norm
from titan_model.layers.rope import make_rope
from titan_model.loss import LossSums
from titan_model.moe.layer import MoE
from titan_model.token_ids import check_range


class Block(nn.Module):
    """One transformer layer: attention, then feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config)
        self.ffn_norm = make_norm(config)
        self.multiplier = config.residual_multiplier
        self.ffn = MoE(config) if config.has_experts(layer) else FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask | None, cache: LayerCache | None = None) -> Tensor:
        """Apply the block to `x` `[B, S, D]`; see `Attention.forward` for the other arguments."""
        x = x + scaled(self.attn(self.attn_norm(x), rope, mask, cache), self.multiplier)
        out: Tensor = x + scaled(self.ffn(self.ffn_norm(x)), self.multiplier)
        return out


def scaled(x: Tensor, factor: float) -> Tensor:
    """Return `x` times a factor, without an operation if that is 1."""
    return x if factor == 1 else x * factor


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: The shape of the model. Under `torch.device("meta")` no memory is allocated.

    Attributes:
        companions: Tokenizer files and the like of the folder that the model was loaded from; None if there is none.
    """

    _config: DecoderConfig
    companions: Companions | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._config = config
        self.companions = None
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        # A dict, so that a block keeps its name when other blocks are removed (pipeline stages).
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layers)})
        self.norm = make_norm(config)
        self.head = Head(config.dim, config.vocab_size)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight

    @property
    def config(self) -> DecoderConfig:
        """The shape of the model, which its modules were built with: it cannot be replaced."""
        return self._config

    @config.setter
    def config(self, _: object) -> None:
        raise AttributeError(
            "Decoder.config cannot be replaced: the modules were built with it. Build another model with "
            "`build(dataclasses.replace(model.config, ...))`, or pass the change to load_huggingface"
        )

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
        """Return next-token logits or, given labels, the loss, which never materializes all logits.

        Args:
            tokens: Integers `[B, S]` in `range(V)`.
            positions: Integers `[B, S]` below `config.max_seq_len`, restarting at each document; None counts from 0.
            document_ids: Integers `[B, S]`; tokens attend only within their own document. None: each sequence is one
                document.
            labels: Integers `[B, S]` in `range(V)`, already shifted; -100 is not scored.
            source_ids: Integers `[B]`: the source of each sequence, for a separate loss per source.
            n_sources: Number of sources.
            z_loss: Coefficient of the z-loss; see `linear_cross_entropy`.
            cache: Keys and values of earlier tokens, to which those of `tokens` are added; determines the positions.

        Returns:
            Logits `[B, S, V]` in the dtype of the parameters, or the sums of the loss. With a cache, the logits after
            each sequence's last token only, `[B, 1, V]`.

        Raises:
            ValueError: If a token or a label is outside the vocabulary, or a position is not below
                `config.max_seq_len`. (On CUDA values are checked on the device, without waiting: CUDA prints the
                message and fails in a later call.)
        """
        config = self.config
        check_range("tokens", tokens, config.vocab_size, "does the tokenizer have more tokens than vocab_size?")
        masks: Mapping[int | None, Mask | None] = {}
        if cache is not None:
            _check_length(cache.used + tokens.shape[1], config)
            positions, masks = cache.advance(tokens, config)
            rope = make_rope(config, positions, cache.lengths[:, None])
        elif positions is None:
            _check_length(tokens.shape[1], config)
            rope = make_rope(config, torch.arange(tokens.shape[1], device=tokens.device)[None])
        else:
            check_range("positions", positions, config.max_seq_len, _MAX_SEQ_LEN)
            rope = make_rope(config, positions)
        x = scaled(self.embed(tokens), config.embedding_multiplier)  # [B, S, D]
        if cache is None:
            masks = make_masks(config, document_ids, x)
        for name, block in self.layers.items():
            layer = int(name)
            turned = None if layer in config.nope_layers else rope
            x = block(x, turned, masks[config.window_of(layer)], None if cache is None else cache.layers[name])
        if cache is not None:
            x = cache.select_last(x)  # only the last token of each sequence has a next token to predict
        x = scaled(self.norm(x), 1 / config.logits_scaling)
        if labels is None:
            logits: Tensor = self.head(x)  # [B, S, V]
            return logits
        loss: LossSums = self.head(x, labels=labels, source_ids=source_ids, n_sources=n_sources, z_loss=z_loss)
        return loss


_MAX_SEQ_LEN = "the model is made for max_seq_len tokens: to exceed it, change max_seq_len in its config"


def _check_length(length: int, config: DecoderConfig) -> None:
    if length > config.max_seq_len:
        raise ValueError(f"tokens: sequences of {length} exceed {config.max_seq_len}; {_MAX_SEQ_LEN}")


def build(config: DecoderConfig, device: torch.device | str | None = None) -> Decoder:
    """Build a decoder.

    Args:
        config: The shape of the model.
        device: Device of the parameters; None takes torch's default device. They have torch's default initialization
            until `init_parameters` or a checkpoint fills them; on `meta` no memory is allocated. (torch's `to_empty`
            unties weights: set `model.head.weight = model.embed.weight` after it.)

    Returns:
        The model.

    Example:
        >>> import torch
        >>> from titan_model import build, init_parameters, preset
        >>> config = preset("debug")
        >>> model = build(config)
        >>> init_parameters(model.named_parameters(), config, seed=0)
        >>> tokens = torch.tensor([[1, 2, 3, 4]])
        >>> model(tokens).shape  # logits
        torch.Size([1, 4, 264])
        >>> sums = model(tokens, labels=torch.tensor([[2, 3, 4, -100]]))
        >>> sums.scored.tolist()
        [3]
    """
    with nullcontext() if device is None else torch.device(device):
        return Decoder(config)
