"""The key/value cache of generation, so that keys and values of each token are computed once.

Sequences have different lengths. All of them start at slot 0, so a slot's number is its token's position. The first
forward adds the prompts, padded at the end, where no earlier token attends; each later forward adds one token per
sequence, which overwrites the padding. Slots beyond a sequence's length are masked.

A block with a sliding window of `W` keeps the last `W` tokens of each sequence: the token at position `p` is in slot
`p % W`. No order is needed, since keys are rotated by their positions and the mask is the same for all of them.

Keys are stored rotated. Where the rotation depends on the length of the text (`rope_scaling`), a longer text may need
other keys, and other values in all blocks but the first: `is_outdated` says when, and `generate` begins a new cache.

Used by `generation.generate`; `Decoder.forward` takes a `KVCache`, `Attention.forward` the `LayerCache` of its block.

Shapes: `B` sequences, `S` new tokens of each, `T` slots in use, `Hkv` key/value heads, `Dh` head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from titan_model.config import DecoderConfig
from titan_model.fused_ops import rotate
from titan_model.layers.masks import Mask
from titan_model.rope_scalings import DynamicScaling, LongRopeScaling

Rope = tuple[Tensor, Tensor]


class LayerCache:
    """One block's keys and values.

    Args:
        cache: The state that all blocks share.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, rope: Rope | None, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the new tokens.

        Args:
            k: `[B, S, Hkv, Dh]`, not rotated.
            v: `[B, S, Hkv, Dh]`.
            rope: Cosine and sine of the new tokens' rotary angles; None: no rotary positions.
            window: The block's window, the same in every call.

        Returns:
            Rotated keys, and values, of all tokens that the new ones attend to, `[B, Hkv, T, Dh]` each: first the
            prompts, then what is stored.
        """
        shared, new = self._cache, k.shape[1]
        k, v = (k if rope is None else rotate(k, rope)).transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, S, Dh]
        if self._k is None or self._v is None:  # allocated here, where dtype, device and number of heads are known
            capacity = shared.slots_of(window)
            shape = (*k.shape[:2], capacity, k.shape[3])
            # Zeros, not uninitialized memory: masked slots have weight 0, but 0 * nan is nan.
            self._k, self._v = k.new_zeros(shape), v.new_zeros(shape)
            if new <= capacity:
                self._k[:, :, :new], self._v[:, :, :new] = k, v
            else:
                places = shared.slot_positions(window)[:, None, :, None].expand(*shape)
                self._k.copy_(k.gather(2, places))
                self._v.copy_(v.gather(2, places))
            return k, v
        sequences, positions = shared.last
        slots, used = positions % self._k.shape[2], min(shared.used, self._k.shape[2])
        self._k[sequences, :, slots], self._v[sequences, :, slots] = k[:, :, 0], v[:, :, 0]
        return self._k[:, :, :used], self._v[:, :, :used]

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
        last: Where each sequence's last token is: sequences `[B]` and positions `[B]`.
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
        self._known_lengths = list(prompt_lengths)  # the same, without waiting for the device
        self.last = (torch.arange(len(prompt_lengths), device=device), self.lengths - 1)

    def advance(self, tokens: Tensor, config: DecoderConfig) -> tuple[Tensor, Mapping[int | None, Mask | None]]:
        """Start a forward: reserve slots for `tokens` and return their positions and masks.

        Args:
            tokens: Integers `[B, S]`: first the prompts, padded at the end, then one token of each sequence.
            config: The decoder's shape.

        Returns:
            Positions `[1, S]` or `[B, 1]`, and the mask of the blocks with each window: None means causal.

        Raises:
            ValueError: If `tokens` has another shape, or there are more tokens than the capacity; nothing is changed.
        """
        new, prefill = tokens.shape[1], self.used == 0
        if len(tokens) != len(self.lengths):
            raise ValueError(f"KVCache: it holds {len(self.lengths)} sequences, but tokens has {len(tokens)}")
        if prefill and new < max(self._known_lengths):
            raise ValueError(f"KVCache: the longest prompt has {max(self._known_lengths)} tokens, but tokens has {new}")
        if not prefill and new != 1:
            raise ValueError(f"KVCache: after the prompts, pass one token of each sequence at a time, not {new}")
        if self.used + new > self.capacity:
            raise ValueError(f"KVCache: {self.used + new} tokens exceed its capacity of {self.capacity}")
        if not prefill and self.is_outdated(config):
            raise ValueError(
                "KVCache: the rotary positions of this model are scaled by the length of the text, and one token more "
                "changes them: begin a new cache with the full texts (`is_outdated` says when, and `generate` does it)"
            )
        self.used += new
        slots = torch.arange(self.used, device=tokens.device)
        if prefill:
            masks: dict[int | None, Mask | None] = dict.fromkeys(config.windows)
            for window in config.windows - {None}:
                seen = torch.ones(new, new, dtype=torch.bool, device=tokens.device).tril().triu(1 - (window or new))
                masks[window] = Mask(window=window, allowed=seen[None, None])
            return slots[None], masks
        self.lengths = self.lengths + 1
        self._known_lengths = [length + 1 for length in self._known_lengths]
        self.last = (self.last[0], self.lengths - 1)
        stored = (slots < self.lengths[:, None])[:, None, None]
        return self.last[1][:, None], {
            window: Mask(window=window, allowed=stored[..., : self.slots_of(window)]) for window in config.windows
        }

    def slots_of(self, window: int | None) -> int:
        """Return the number of slots of each sequence in a block with a window, or without."""
        return self.capacity if window is None else min(window, self.capacity)

    def slot_positions(self, window: int | None) -> Tensor:
        """Return the position of the token in each slot, int64 `[B, slots_of(window)]`; 0 in unused slots."""
        n_slots, last = self.slots_of(window), self.lengths[:, None] - 1
        slots = torch.arange(n_slots, device=last.device)
        return (last - (last - slots) % n_slots).clamp(min=0)

    def is_outdated(self, config: DecoderConfig) -> bool:
        """Return whether a token more changes what earlier tokens of a sequence are computed to."""
        scaling = config.rope_scaling
        if not isinstance(scaling, DynamicScaling | LongRopeScaling):
            return False
        return any(scaling.changes_after(length) for length in self._known_lengths)

    def select_last(self, x: Tensor) -> Tensor:
        """Select each sequence's last token from those of the current forward: `[B, S, D]` to `[B, 1, D]`."""
        return x if x.shape[1] == 1 else x[self.last][:, None]

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences except these, and put them into this order."""
        index = torch.tensor(sequences, device=self.lengths.device)
        self.lengths = self.lengths[index]
        self._known_lengths = [self._known_lengths[sequence] for sequence in sequences]
        self.last = (torch.arange(len(sequences), device=index.device), self.lengths - 1)
        for layer in self.layers.values():
            layer.keep(index)
