"""Keys and values of the tokens a model has seen, so that generation computes each of them once.

Rows hold texts of different lengths. They all begin at slot 0, so a slot's number is its token's position. The first
forward brings the prompts, padded at their ends, where no earlier token looks; each further one brings one token per
row, which takes the place of the padding. What lies beyond a row's length is masked.

Shapes: `B` rows, `S` new tokens of each, `T` slots in use, `Hkv` key/value heads, `Dh` head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from titan_model.layers.masks import Mask


class LayerCache:
    """One block's keys and values.

    Args:
        cache: What all blocks share.
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
        if self._k is None or self._v is None:  # only the model knows dtype, device and how many heads this rank has
            shape = (*k.shape[:2], shared.capacity, k.shape[3])
            # Zeros, since a weight of 0 does not mask what happens to be no number.
            self._k, self._v = k.new_zeros(shape), v.new_zeros(shape)
            self._k[:, :, :new], self._v[:, :, :new] = k, v
        else:
            rows, slots = shared.last
            self._k[rows, :, slots], self._v[rows, :, slots] = k[:, :, 0], v[:, :, 0]
        return self._k[:, :, : shared.used], self._v[:, :, : shared.used]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        if self._k is not None and self._v is not None:
            self._k, self._v = self._k[rows], self._v[rows]


class KVCache:
    """Keys and values of all blocks.

    Args:
        layers: Names of the blocks.
        prompts: Number of tokens in each row's prompt.
        capacity: Most tokens of a row, those of the prompt and those to come.
        device: Where the model computes.

    Attributes:
        layers: The cache of each block.
        capacity: Most tokens of a row.
        lengths: int64 `[B]`: tokens of each row so far, those of the forward under way included.
        used: Tokens of the longest row so far, at least (`T`).
        last: Where each row's last token is: rows `[B]` and slots `[B]`.
    """

    def __init__(
        self, layers: Iterable[str], prompts: Sequence[int], capacity: int, device: torch.device | str
    ) -> None:
        self.layers = {name: LayerCache(self) for name in layers}
        self.capacity = capacity
        self.lengths = torch.tensor(prompts, device=device)
        self.used = 0
        self.last = (torch.arange(len(prompts), device=device), self.lengths - 1)

    def place(self, tokens: Tensor) -> tuple[Tensor, Mask | None]:
        """Begin a forward: make room for `tokens` and say where they are and what they may look at.

        Args:
            tokens: Integers `[B, S]`: the prompts, padded at their ends, or then one token of each row.

        Returns:
            Positions `[1, S]` or `[B, 1]`, and the mask: None is plain causal.
        """
        new, prefill = tokens.shape[1], self.used == 0
        assert prefill or new == 1, "after the prompts, one token of each row at a time"
        self.used += new
        assert self.used <= self.capacity, "the cache is full"
        slots = torch.arange(self.used, device=tokens.device)
        if prefill:
            return slots[None], None
        self.lengths = self.lengths + 1
        self.last = (self.last[0], self.lengths - 1)
        return self.last[1][:, None], Mask(allowed=(slots < self.lengths[:, None])[:, None, None])

    def newest(self, x: Tensor) -> Tensor:
        """Return each row's last token's vector, `[B, 1, D]`, of all new ones `x` `[B, S, D]`."""
        return x if x.shape[1] == 1 else x[self.last][:, None]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[index]
        self.last = (torch.arange(len(rows), device=index.device), self.lengths - 1)
        for layer in self.layers.values():
            layer.keep(index)
