"""Attention masks, prepared once per forward in the form that the attention back-end needs.

Called by `Decoder.forward`; `attention_backends` computes attention with the mask. A document is a run of equal ids
within a sequence: tokens attend to their own run, up to themselves; with a sliding window, to the last tokens of that.

Shapes: `B` batch, `S` queries, `T` keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from titan_model.config import DecoderConfig

_BLOCK = 128  # FlexAttention computes or skips blocks of this many queries and keys
_FLASH_HEAD_DIM = 256  # the widest head that torch's flash kernels for CUDA support
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query attends to: one of `allowed`, `blocks` and `boundaries`, and the document ids behind it.

    Attributes:
        document_ids: Integers `[B, S]`, as passed to the decoder; None for masks without documents.
        window: Number of keys that a query attends to at most; None for all of its document.
        allowed: Bool `[B, 1, S, T]`, query by key, for `sdpa`.
        blocks: For `flex`.
        boundaries: int32 `[N + 1]`, for `varlen`: start of each document in the flattened `[B * S]`, then `B * S`.
    """

    document_ids: Tensor | None = None
    window: int | None = None
    allowed: Tensor | None = None
    blocks: BlockMask | None = None
    boundaries: Tensor | None = None


def make_masks(config: DecoderConfig, document_ids: Tensor | None, x: Tensor) -> Mapping[int | None, Mask | None]:
    """Return the mask of the blocks with each window that the config has; see `make_mask` for the arguments."""
    return {window: make_mask(config, document_ids, x, window) for window in config.windows}


def make_mask(config: DecoderConfig, document_ids: Tensor | None, x: Tensor, window: int | None = None) -> Mask | None:
    """Return a mask, or None if each sequence is one document, attended to in full, and SDPA computes attention.

    Args:
        config: Its `attention` names the back-end.
        document_ids: Integers `[B, S]`, or None: each sequence is one document.
        x: `[B, S, D]`, the first block's input, for the device and dtype of the model.
        window: Number of keys that a query attends to, or None for all.

    Raises:
        ValueError: If the back-end that the config names cannot run here, or the shapes differ.
    """
    if window is not None and window >= x.shape[1]:
        window = None  # of a sequence this short, every query attends to all keys before it
    if document_ids is None:
        if config.attention in ("auto", "sdpa") and window is None:
            return None
        document_ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    if document_ids.shape != x.shape[:2]:
        raise ValueError(
            f"document_ids: shape {list(document_ids.shape)} differs from that of tokens, {list(x.shape[:2])}"
        )
    runs = _runs(document_ids)
    match _backend(config, x):
        case "sdpa":
            same = (runs[:, :, None] == runs[:, None, :]).tril()
            return Mask(document_ids, window, allowed=(same if window is None else same.triu(1 - window))[:, None])
        case "flex":
            return Mask(document_ids, window, blocks=_blocks(runs, window))
        case "varlen":
            return Mask(document_ids, window, boundaries=_boundaries(runs))


def _backend(config: DecoderConfig, x: Tensor) -> Literal["sdpa", "flex", "varlen"]:
    """Return the back-end that computes attention within documents on the device of `x`."""
    kind, device = config.attention, x.device.type
    if kind == "auto":
        if device == "cuda":
            return "flex" if _flash_unsupported(config, x) else "varlen"
        return "varlen" if device == "cpu" else "sdpa"
    if kind in ("flex", "varlen") and device not in ("cpu", "cuda"):
        raise ValueError(f"attention {kind!r} runs on CUDA and CPU, not on {device}: set attention to 'auto'")
    if kind == "flex" and device == "cpu" and torch.is_grad_enabled():
        raise ValueError(
            "attention 'flex' has no backward on the CPU: set attention to 'auto' to train, or run the model under "
            "torch.no_grad()"
        )
    if kind == "varlen" and device == "cuda" and (reason := _flash_unsupported(config, x)):
        raise ValueError(f"attention 'varlen' cannot run here: CUDA's kernels {reason}; set attention to 'auto'")
    return kind


def _flash_unsupported(config: DecoderConfig, x: Tensor) -> str | None:
    """Return why torch's flash kernels for CUDA cannot run, or None if they can."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if dtype not in _HALF:
        return f"support bfloat16 and float16, not {dtype}"
    width = config.attention_head_dim
    if width % 8 or width > _FLASH_HEAD_DIM:
        return f"need a head_dim that is a multiple of 8 up to {_FLASH_HEAD_DIM}, not {width}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "need compute capability 8.0 or above"
    return None


def _runs(document_ids: Tensor) -> Tensor:
    """Number the documents of each sequence from 0 in their order, int32 `[B, S]`."""
    changes = torch.zeros_like(document_ids, dtype=torch.int32)
    changes[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return changes.cumsum(1, dtype=torch.int32)


def _boundaries(runs: Tensor) -> Tensor:
    """Return where the documents of all sequences start in `[B * S]`, then `B * S`."""
    begins = torch.ones_like(runs, dtype=torch.bool)
    begins[:, 1:] = runs[:, 1:] != runs[:, :-1]
    flat, total = begins.flatten(), runs.numel()
    if runs.is_cuda:  # exactly one entry per document, since the kernel does work for each; `nonzero` synchronizes
        starts = flat.nonzero()[:, 0]
        return torch.cat([starts, starts.new_full((1,), total)]).int()
    # Elsewhere a size that does not depend on the data, so that the forward can be traced with fake tensors. Tokens
    # that do not start a document are all written to the last entry, which is then set to the total.
    places = torch.where(flat, flat.cumsum(0) - 1, total)
    boundaries = torch.full((total + 1,), total, dtype=torch.int32, device=runs.device)
    boundaries.scatter_(0, places, torch.arange(total, dtype=torch.int32, device=runs.device))
    boundaries[total] = total
    return boundaries


def _blocks(runs: Tensor, window: int | None) -> BlockMask:
    """Return FlexAttention's mask, computed from the first and last document of each block of tokens.

    No tensor of size `S * S` is needed: a pair of blocks has no common document, some, or the same single one, and the
    ids at the edges of the blocks say which. So do the distances of their edges for the window.
    """
    length = runs.shape[1]
    reach = length if window is None else window

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < reach) & (runs[row, query] == runs[row, key])

    edges = torch.arange(0, length, _BLOCK, device=runs.device)
    first, last = runs[:, edges], runs[:, (edges + _BLOCK - 1).clamp(max=length - 1)]
    # Documents are numbered in order, so two blocks share one only if it extends from the first to the second.
    causal = edges[:, None] >= edges[None, :]
    some = causal & (first[:, :, None] == last[:, None, :])
    some |= torch.eye(len(edges), dtype=torch.bool, device=runs.device)
    unpadded = edges + _BLOCK <= length
    full = (edges[:, None] > edges[None, :]) & unpadded[:, None] & (last[:, :, None] == first[:, None, :])
    distance = edges[:, None] - edges[None, :]
    some &= distance - _BLOCK + 1 < reach  # from the first query to the last key
    full &= distance + _BLOCK - 1 < reach  # from the last query to the first key
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~full), *_in_order(full), BLOCK_SIZE=_BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen key blocks of each query block, and all block indices with the chosen ones first."""
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]
