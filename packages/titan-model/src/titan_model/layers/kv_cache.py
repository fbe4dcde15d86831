"""The key/value cache of generation, so that keys and values of each token are computed once.

Sequences have different lengths. All of them start at slot 0, so a slot's number is its token's position. The first
forward adds the prompts, padded at the end, where no earlier token attends; each later forward adds one token per
sequence, which overwrites the padding. Slots beyond a sequence's length are masked.

Used by `generation.generate`; `Decoder.forward` takes a `KVCache`, `Attention.forward` the `LayerCache` of its block.

Shapes: `B` sequences, `S` new tokens of each, `T` slots in use, `Hkv` key/value heads, `Dh` head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from titan_model.layers.masks import Mask


class LayerCache:
    """One block's keys and values.

    Args:
        cache: The state that all blocks share.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the new tokens.

        Args:
            k: `[B, Hkv, S, Dh]`.
            v: `[B, Hkv, S, Dh]`.

        Returns:
            Keys and values of all tokens so far, `[B, Hkv, T, Dh]` each.
        """
        shared, new = self._cache, k.shape[2]
        if self._k is None or self._v is None:  # allocated here, where dtype, device and number of heads are known
            shape = (*k.shape[:2], shared.capacity, k.shape[3])
            # Zeros, not uninitialized memory: masked slots have weight 0, but 0 * nan is nan.
            self._k, self._v = k.new_zeros(shape), v.new_zeros(shape)
            self._k[:, :, :new], self._v[:, :, :new] = k, v
        else:
            sequences, slots = shared.last
            self._k[sequences, :, slots], self._v[sequences, :, slots] = k[:, :, 0], v[:, :, 0]
        return self._k[:, :, : shared.used], self._v[:, :, : shared.used]

    def keep(self, sequences: Tensor) -> None:
        """Drop all sequences except these."""
        if self._k is not None and self._v is not None:
            self._k, self._v = self._k[sequences], self._v[sequences]


class KVCache:
    """Keys and values of all blocks.

    Args:
        layers: Names of the blocks.
        prompt_lengths: Number of tokens in each sequence's prompt.
        capacity: Maximum number of tokens of a sequence, prompt included.
        device: Device of the model.

    Raises:
        ValueError: If a prompt has no tokens or more than `capacity`.

    Attributes:
        layers: The cache of each block.
        capacity: Maximum number of tokens of a sequence.
        lengths: int64 `[B]`: tokens of each sequence so far, including those of the current forward.
        used: Slots in use (`T`): at least the tokens of the longest sequence.
        last: Where each sequence's last token is: sequences `[B]` and slots `[B]`.
    """

    def __init__(
        self, layers: Iterable[str], prompt_lengths: Sequence[int], capacity: int, device: torch.device | str
    ) -> None:
        if not prompt_lengths or min(prompt_lengths) < 1 or max(prompt_lengths) > capacity:
            raise ValueError(f"KVCache: prompt_lengths must be from 1 to the capacity {capacity}; got {prompt_lengths}")
        self.layers = {name: LayerCache(self) for name in layers}
        self.capacity = capacity
        self.lengths = torch.tensor(prompt_lengths, device=device)
        self.used = 0
        self._longest_prompt = max(prompt_lengths)
        self.last = (torch.arange(len(prompt_lengths), device=device), self.lengths - 1)

    def advance(self, tokens: Tensor) -> tuple[Tensor, Mask | None]:
        """Start a forward: reserve slots for `tokens` and return their positions and mask.

        Args:
            tokens: Integers `[B, S]`: first the prompts, padded at the end, then one token of each sequence.

        Returns:
            Positions `[1, S]` or `[B, 1]`, and the mask: None means causal.

        Raises:
            ValueError: If `tokens` has another shape, or there are more tokens than the capacity; nothing is changed.
        """
        new, prefill = tokens.shape[1], self.used == 0
        if len(tokens) != len(self.lengths):
            raise ValueError(f"KVCache: it holds {len(self.lengths)} sequences, but tokens has {len(tokens)}")
        if prefill and new < self._longest_prompt:
            raise ValueError(f"KVCache: the longest prompt has {self._longest_prompt} tokens, but tokens has {new}")
        if not prefill and new != 1:
            raise ValueError(f"KVCache: after the prompts, pass one token of each sequence at a time, not {new}")
        if self.used + new > self.capacity:
            raise ValueError(f"KVCache: {self.used + new} tokens exceed its capacity of {self.capacity}")
        self.used += new
        slots = torch.arange(self.used, device=tokens.device)
        if prefill:
            return slots[None], None
        self.lengths = self.lengths + 1
        self.last = (self.last[0], self.lengths - 1)
        return self.last[1][:, None], Mask(allowed=(slots < self.lengths[:, None])[:, None, None])

    def select_last(self, x: Tensor) -> Tensor:
        """Select each sequence's last token from those of the current forward: `[B, S, D]` to `[B, 1, D]`."""
        return x if x.shape[1] == 1 else x[self.last][:, None]

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences except these, and put them into this order."""
        index = torch.tensor(sequences, device=self.lengths.device)
        self.lengths = self.lengths[index]
        self.last = (torch.arange(len(sequences), device=index.device), self.lengths - 1)
        for layer in self.layers.values():
            layer.keep(index)
