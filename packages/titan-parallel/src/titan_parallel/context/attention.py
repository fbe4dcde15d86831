"""Context-parallel attention: each rank has a part of every sequence and attends to the full sequence.

There are three kinds. `allgather`: each rank gathers all keys and values. `ring`: they travel from rank to rank.
`ulysses`: ranks exchange their parts of the sequence for parts of the heads, and back (Jacobs et al. 2023,
arXiv:2309.14509).

`parallelize` puts `ContextAttention` in the place of the plan's attention modules; models that compute attention in a
function call `context_attention`.

Shapes: `B` batch, `H` query heads, `Hkv` key/value heads, `S` tokens of this rank, `Dh` head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_parallel.context.blockwise import attend, document_starts
from titan_parallel.context.collectives import Peers, all_to_all, gather_sequence, peers_of
from titan_parallel.context.flex import attend_flex
from titan_parallel.context.kernels import Inputs
from titan_parallel.context.layout import Span, is_balanced, spans_of, take_part
from titan_parallel.context.ring import ring_attention
from titan_parallel.errors import LayoutError
from titan_parallel.options import ContextKind


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None = None,
    *,
    group: ProcessGroup,
    kind: ContextKind = "allgather",
    scale: float | None = None,
) -> Tensor:
    """Attend causally to full sequences of which each rank of `group` has a part, as `ParallelModel` cuts them.

    For models that compute attention in a function; attention modules are replaced by `parallelize`. All ranks of the
    group must call it together, in backward too.

    Args:
        q: `[B, H, S, Dh]`, this rank's part, a regular tensor like `k` and `v`; rotary angles must be those of the
            tokens' positions in the full sequence.
        k: `[B, Hkv, S, Dh]`; `H` is a multiple of `Hkv`; do not repeat heads.
        v: `[B, Hkv, S, Dh]`.
        document_ids: Integers `[B, S]`, this rank's part: tokens attend only within their own run of equal ids of the
            full sequence. None: each sequence is one document.
        group: The ranks that share each sequence, `mesh["cp"].get_group()`.
        kind: The algorithm; equal on all ranks, and equal to `ParallelOptions.context`, by which sequences are cut.
        scale: Factor of the scores; None is one over the square root of `Dh`.

    Returns:
        `[B, H, S, Dh]`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 8, 16)  # with one rank, equal to regular causal attention
        >>> out = context_attention(q, k, v, group=build_mesh(Degrees(), "cpu")["cp"].get_group(), kind="ring")
        >>> torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attend((q, k, v), document_ids, peers_of(group), kind, scale)


class ContextAttention(nn.Module):
    """Replacement of a module that computes attention, called like it: `core(q, k, v, mask)`. Has no parameters."""

    def __init__(self, group: ProcessGroup, kind: ContextKind) -> None:
        super().__init__()
        self.peers = peers_of(group)
        self.kind = kind

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        """Attend as `context_attention` does. Only the attribute `document_ids` of `mask` is read."""
        document_ids = None if mask is None else mask.document_ids
        return _attend((q, k, v), document_ids, self.peers, self.kind, q.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        """Return the kind and the number of ranks that share a sequence."""
        return f"{self.kind}, cp={self.peers.size}"


def replace_attention(model: nn.Module, names: Iterable[str], group: ProcessGroup, kind: ContextKind) -> None:
    """Replace the modules `names` by context-parallel attention.

    Raises:
        LayoutError: If a module has parameters, which would be lost.
    """
    names = list(names)
    owning = [name for name in names if next(model.get_submodule(name).parameters(), None) is not None]
    if owning:
        raise LayoutError(
            f"plan['attention']: context parallelism replaces these modules, but some have parameters: "
            f"{', '.join(owning)}; name the modules that are called as core(q, k, v, mask) and only compute attention"
        )
    for name in names:
        model.set_submodule(name, ContextAttention(group, kind))


def _attend(inputs: Inputs, document_ids: Tensor | None, peers: Peers, kind: ContextKind, scale: float) -> Tensor:
    q, k, v = inputs
    device = q.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention does
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"queries, keys and values must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    starts = None
    if document_ids is not None:
        # Two documents may have the same id, and a document may span ranks: only full sequences show where they begin.
        ids = gather_sequence(document_ids, 1, peers.group, peers.size, kind)
        starts = document_starts(ids)
        if kind != "ulysses":
            starts = take_part(starts, 1, peers.rank, peers.size, balanced=is_balanced(kind))
    if kind == "ulysses":
        return _by_heads((q, k, v), starts, peers, scale)
    if kind == "ring":
        out: Tensor = ring_attention(q, k, v, starts, peers.group, scale)[0]
        return out
    k, v = gather_sequence(torch.stack([k, v]), 3, peers.group, peers.size, kind)
    spans = spans_of(peers.rank, peers.size, q.shape[2], balanced=is_balanced(kind))
    return _to_full((q, k, v), starts, spans, scale)


def _to_full(inputs: Inputs, starts: Tensor | None, spans: list[Span], scale: float) -> Tensor:
    """Attend from queries of some spans of each sequence to the keys and values of all of it."""
    q, k, v = inputs
    if starts is None and spans[0].length == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if starts is not None and q.is_cuda:
        places = torch.cat([torch.arange(s.place, s.place + s.length, device=q.device) for s in spans])
        return attend_flex(q, k, v, places, starts, scale)
    out: Tensor = attend(q, k, v, starts, [span.place for span in spans], scale)[0]
    return out


def _by_heads(inputs: Inputs, starts: Tensor | None, peers: Peers, scale: float) -> Tensor:
    """Exchange parts of the sequence for parts of the heads, attend with full sequences, and exchange back."""
    (q, k, v), size = inputs, peers.size
    if q.shape[1] % size:
        raise LayoutError(f"context 'ulysses': cp {size} does not divide {q.shape[1]} query heads; use another kind")
    # With fewer key/value heads than ranks, each head is sent to all ranks whose queries need it.
    repeated = size // math.gcd(k.shape[1], size)
    if repeated > 1:
        k, v = k.repeat_interleave(repeated, 1), v.repeat_interleave(repeated, 1)
    each = [x.shape[1] // size for x in (q, k, v)]
    packed = torch.cat([torch.unflatten(x, 1, (size, -1)) for x in (q, k, v)], 2).movedim(1, 0)  # [n, B, heads, S, Dh]
    full = all_to_all(packed, peers.group).movedim(0, 2).flatten(2, 3)  # [B, heads, n * S, Dh]
    q, k, v = full.split(each, 1)
    out = _to_full((q, k, v), starts, [Span(0, 0, q.shape[2])], scale)  # [B, H / n, n * S, Dh]
    parts: Tensor = all_to_all(torch.unflatten(out, 2, (size, -1)).movedim(2, 0), peers.group)  # [n, B, H / n, S, Dh]
    return parts.movedim(0, 1).flatten(1, 2)
