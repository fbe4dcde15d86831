"""Where queries may look, prepared once per forward in the form that the back-end wants.

A document is a run of equal ids within a row: tokens attend to their own run, up to themselves.

Shapes: `B` batch, `S` queries, `T` keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from titan_model.config import DecoderConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # side of the squares that FlexAttention computes or leaves out as a whole
_FLASH_HEAD_DIM = 256  # the widest head that torch's flash kernels for CUDA take
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Mask:
    """Where queries may look: one of `allowed`, `blocks` and `boundaries`, and what it was made of.

    Attributes:
        document_ids: Integers `[B, S]`, as they came in; None where no documents are told apart.
        allowed: Bool `[B, 1, S, T]`, query by key, for `sdpa`.
        blocks: For `flex`.
        boundaries: int32 `[N + 1]`, for `varlen`: where each document of the flattened `[B * S]` begins, and `B * S`.
    """

    document_ids: Tensor | None = None
    allowed: Tensor | None = None
    blocks: BlockMask | None = None
    boundaries: Tensor | None = None


def make_mask(config: DecoderConfig, document_ids: Tensor | None, x: Tensor) -> Mask | None:
    """Return what the blocks' attention needs to know, or None where each row is one document and SDPA attends.

    Args:
        config: Names the back-end.
        document_ids: Integers `[B, S]`, or None: each row is one document.
        x: `[B, S, D]`, the first block's input, on whose device and in whose dtype the model computes.

    Raises:
        ValueError: If the back-end that the config names cannot run here, or the shapes disagree.
    """
    if document_ids is None:
        if config.attention in ("auto", "sdpa"):
            return None
        document_ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    if document_ids.shape != x.shape[:2]:
        raise ValueError(f"document_ids are {list(document_ids.shape)}, but the tokens are {list(x.shape[:2])}")
    runs = _runs(document_ids)
    match _backend(config, x):
        case "sdpa":
            return Mask(document_ids, allowed=(runs[:, :, None] == runs[:, None, :]).tril()[:, None])
        case "flex":
            return Mask(document_ids, blocks=_blocks(runs))
        case "varlen":
            return Mask(document_ids, boundaries=_boundaries(runs))


def _backend(config: DecoderConfig, x: Tensor) -> Literal["sdpa", "flex", "varlen"]:
    """Return what attends within documents on the device of `x`."""
    kind, device = config.attention, x.device.type
    if kind == "auto":
        if device == "cuda":
            return "flex" if _why_no_flash(config, x) else "varlen"
        return "varlen" if device == "cpu" else "sdpa"
    if kind in ("flex", "varlen") and device not in ("cpu", "cuda"):
        raise ValueError(f"attention {kind!r} runs on CUDA and on the CPU, not on {device}: set attention to 'auto'")
    if kind == "flex" and device == "cpu" and torch.is_grad_enabled():
        raise ValueError(
            "attention 'flex' has no backward on the CPU: set attention to 'auto' to train, or run the model under "
            "torch.no_grad()"
        )
    if kind == "varlen" and device == "cuda" and (reason := _why_no_flash(config, x)):
        raise ValueError(f"attention 'varlen' cannot run here: CUDA's kernels {reason}; set attention to 'auto'")
    return kind


def _why_no_flash(config: DecoderConfig, x: Tensor) -> str | None:
    """Return what torch's flash kernels for CUDA need and do not find, if anything."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if dtype not in _HALF:
        return f"take bfloat16 and float16, not {dtype}"
    width = config.attention_head_dim
    if width % 8 or width > _FLASH_HEAD_DIM:
        return f"take a head_dim that is a multiple of 8 up to {_FLASH_HEAD_DIM}, not {width}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "need compute capability 8.0 or above"
    return None


def _runs(document_ids: Tensor) -> Tensor:
    """Number the documents of each row from 0 in their order, int32 `[B, S]`."""
    changes = torch.zeros_like(document_ids, dtype=torch.int32)
    changes[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return changes.cumsum(1, dtype=torch.int32)


def _boundaries(runs: Tensor) -> Tensor:
    """Return where the documents of all rows begin in `[B * S]`, and `B * S`."""
    begins = torch.ones_like(runs, dtype=torch.bool)
    begins[:, 1:] = runs[:, 1:] != runs[:, :-1]
    flat, total = begins.flatten(), runs.numel()
    if runs.is_cuda:  # the kernel does work for each document it is told of; finding their number waits for the device
        starts = flat.nonzero()[:, 0]
        return torch.cat([starts, starts.new_full((1,), total)]).int()
    # Elsewhere a size that does not depend on the data, so that the forward can be traced with fake tensors.
    places = torch.where(flat, flat.cumsum(0) - 1, total)
    boundaries = torch.full((total + 1,), total, dtype=torch.int32, device=runs.device)
    boundaries.scatter_(0, places, torch.arange(total, dtype=torch.int32, device=runs.device))
    boundaries[total] = total  # where all that begins nothing was put
    return boundaries


def _blocks(runs: Tensor) -> BlockMask:
    """Return FlexAttention's mask, from the first and last document of each block: nothing of size `S * S`."""
    from torch.nn.attention.flex_attention import BlockMask

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (runs[row, query] == runs[row, key])

    length = runs.shape[1]
    edges = torch.arange(0, length, _BLOCK, device=runs.device)
    first, last = runs[:, edges], runs[:, (edges + _BLOCK - 1).clamp(max=length - 1)]
    # Documents are numbered in order, so two blocks share one only if it lasts from the first to the second.
    causal = edges[:, None] >= edges[None, :]
    some = causal & (first[:, :, None] == last[:, None, :])
    some |= torch.eye(len(edges), dtype=torch.bool, device=runs.device)
    complete = edges + _BLOCK <= length
    whole = (edges[:, None] > edges[None, :]) & complete[:, None] & (last[:, :, None] == first[:, None, :])
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~whole), *_in_order(whole), BLOCK_SIZE=_BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block has, and their indices before those that it has not."""
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]
