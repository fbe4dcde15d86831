"""The model of the matrix: a small decoder that is not a titan model, with the features that layouts find difficult.

Grouped key/value heads, rotary positions, documents packed into rows, norms over single heads, a mixture of experts or
none, an output tied to the input or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, TOP_K, BLOCKS = 32, 32, 4, 2, 8, 48, 4, 2, 4
SEQ, ROWS, STEPS, MAX_NORM, EPS = 16, 8, 5, 0.3, 1e-5


@dataclass(frozen=True)
class Shape:
    """Which of the nets."""

    moe: bool = False
    tied: bool = False
    documents: bool = True


@dataclass(frozen=True, eq=False)
class Mask:
    """Where queries may look."""

    document_ids: Tensor
    allowed: Tensor  # [B, 1, S, S]


class Core(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, enable_gqa=True)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate `[B, S, H, Dh]` by its positions."""
    angle = positions[..., None, None] * 10.0 ** -torch.arange(HEAD_DIM // 2)  # [B, S, 1, Dh / 2]
    first, second = x.chunk(2, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.k, self.v = (nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.head_norm = nn.RMSNorm(HEAD_DIM)
        self.core = Core()
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask | None) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, HEAD_DIM)) for m in (self.q, self.k, self.v))
        q, k = turned(self.head_norm(q), positions), turned(self.head_norm(k), positions)
        return self.out(self.core(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(DIM, FFN), nn.Linear(DIM, FFN), nn.Linear(FFN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, FFN, DIM))
        self.down = nn.Parameter(torch.empty(EXPERTS, DIM, FFN))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = F.grouped_mm(x, self.up.transpose(1, 2), offs=ends)
        return F.grouped_mm(F.gelu(hidden), self.down.transpose(1, 2), offs=ends)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = Experts()
        self.shared = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(-1).topk(TOP_K)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        rows = self.experts(tokens[order // TOP_K], counts) * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // TOP_K, rows).view_as(x) + self.shared(x)


class Block(nn.Module):
    def __init__(self, moe: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.LayerNorm(DIM)
        self.attention = Attention()
        self.mlp = Mixture() if moe else FeedForward()

    def forward(self, x: Tensor, positions: Tensor, mask: Mask | None) -> Tensor:
        x = x + self.attention(self.norm1(x), positions, mask)
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, DIM)
        self.stack = nn.ModuleList([Block(shape.moe) for _ in range(BLOCKS)])
        self.last = nn.RMSNorm(DIM)
        self.unembed = nn.Linear(DIM, VOCAB, bias=False)
        if shape.tied:
            self.unembed.weight = self.table.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None]
        mask = None
        if document_ids is not None:
            allowed = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]
            mask = Mask(document_ids, allowed)
        x = self.table(tokens)
        for block in self.stack:
            x = block(x, positions, mask)
        return self.unembed(self.last(x))


def build(shape: Shape) -> Net:
    torch.manual_seed(1)
    net = Net(shape)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


def batch(step: int, shape: Shape) -> dict[str, Tensor]:
    """Return the global batch: tokens, labels and, with documents, their ids and the positions within them."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)
    labels = (tokens * 7 + 1) % VOCAB  # learnable from the token alone
    labels[torch.rand(ROWS, SEQ, generator=generator) < 0.3] = -100  # rows score different numbers of tokens
    if not shape.documents:
        return {"tokens": tokens, "labels": labels}
    starts = torch.rand(ROWS, SEQ, generator=generator) < 0.15
    document_ids = starts.cumsum(1)
    index = torch.arange(SEQ).expand(ROWS, SEQ)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    return {"tokens": tokens, "labels": labels, "positions": positions, "document_ids": document_ids}


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def reference(shape: Shape) -> dict[str, Any]:
    """Train in one process with nothing but torch."""
    net = build(shape)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2, eps=EPS)
    losses, norms = [], []
    for step in range(STEPS):
        given = batch(step, shape)
        labels = given.pop("labels")
        loss = summed_loss(net(**given), labels) / int((labels != -100).sum())
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}
