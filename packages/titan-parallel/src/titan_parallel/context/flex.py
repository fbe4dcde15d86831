"""Causal attention within documents by FlexAttention, one kernel on CUDA. `attention` calls it for full keys.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads, `S` queries, `T` keys, `Dh` head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # side of the squares of scores that are computed or skipped


def attend_flex(q: Tensor, k: Tensor, v: Tensor, places: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Attend from some tokens of each sequence to the full sequence.

    Args:
        q: `[B, H, S, Dh]`.
        k: `[B, Hkv, T, Dh]`.
        v: `[B, Hkv, T, Dh]`.
        places: Integers `[S]`: the position of each query in `T`.
        starts: Integers `[B, S]`: the position at which its document begins.
        scale: Factor of the scores.

    Returns:
        `[B, H, S, Dh]`.
    """
    from torch.nn.attention.flex_attention import flex_attention  # here: it loads torch._dynamo, which takes seconds

    # Uncompiled, FlexAttention holds all scores at once. Within compiled code it is part of that graph.
    alone = q.is_cuda and not torch.compiler.is_compiling()
    run: Any = _compiled() if alone else flex_attention
    mask = _blocks(places, starts, k.shape[2])
    out: Tensor = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # here: it loads torch._dynamo, which takes seconds

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def _blocks(places: Tensor, starts: Tensor, keys: int) -> BlockMask:
    """Return the block mask, derived from the extremes of each block of queries: nothing of size `S * T` is created."""
    from torch.nn.attention.flex_attention import BlockMask  # here: it loads torch._dynamo, which takes seconds

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= places[query]) & (key >= starts[row, query])

    begins = torch.arange(0, keys, _BLOCK, device=places.device)
    ends = (begins + _BLOCK).clamp(max=keys) - 1
    first, last = _extremes(places[None])  # [1, N]
    earliest, latest = _extremes(starts)  # [B, N]
    some = (begins <= last[..., None]) & (ends >= earliest[..., None])  # [B, N, M]
    full = (ends <= first[..., None]) & (begins >= latest[..., None])
    full &= begins + _BLOCK <= keys
    if len(places) % _BLOCK:
        full[:, -1] = False
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~full),
        *_in_order(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=allowed,
        seq_lengths=(len(places), keys),
    )


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum and the maximum of each block of `[B, S]`."""
    missing = -x.shape[1] % _BLOCK
    blocks = torch.unflatten(torch.cat([x, x[:, -1:].expand(-1, missing)], 1), 1, (-1, _BLOCK))
    return blocks.amin(2), blocks.amax(2)


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks chosen for each query block, and all indices, the chosen ones first."""
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]
