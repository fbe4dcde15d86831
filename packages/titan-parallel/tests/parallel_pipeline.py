"""Cases of pipelines, on a small model with two tables before its blocks, and documents that attention keeps apart."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_cases import DIM, HEADS, MAX_NORM, ROWS, SEQ, STEPS, VOCAB, batch, summed_loss, whole
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelModel,
    ParallelOptions,
    ParallelPlan,
    PipelineOptions,
    build_mesh,
    data_axis,
    parallelize,
)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for m in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Returns its output alone or, as many models' layers do, as the first of several."""

    def __init__(self, wraps: bool) -> None:
        super().__init__()
        self.wraps = wraps
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mix = Mixer()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        x = x + self.mix(self.norm1(x), mask)
        x = x + self.mlp(self.norm2(x))
        return (x, None) if self.wraps else x


class Documents(nn.Module):
    """A decoder whose two tables are added, as in a GPT-2, and whose forward reshapes what its last modules return."""

    def __init__(self, tied: bool, layers: int, wraps: bool = False) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(VOCAB, DIM), nn.Embedding(SEQ, DIM)
        self.stack = nn.ModuleList([Layer(wraps) for _ in range(layers)])
        self.last = nn.LayerNorm(DIM)
        self.vocab_out = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.vocab_out.weight = self.table.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens: Tensor, *, document_ids: Tensor) -> Tensor:
        same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.stack:
            x = layer(x, same.tril())
            x = x[0] if layer.wraps else x  # looks at a layer that may be elsewhere
        logits = self.vocab_out(self.last(x))
        return logits.unflatten(-1, (2, VOCAB // 2)).flatten(-2) * self.scale


def plan(tied: bool) -> ParallelPlan:
    return {
        "blocks": ["stack.*"],
        "before": ["table", "places"],
        "after": ["last", "vocab_out"],
        "tensor": {
            "table": "vocab",
            "places": "vocab",
            "stack.*.norm*": "sequence",
            "stack.*.mix": "gather",
            "stack.*.mix.query": "colwise",
            "stack.*.mix.key": "colwise",
            "stack.*.mix.value": "colwise",
            "stack.*.mix.out": "rowwise",
            "stack.*.mlp": "gather",
            "stack.*.mlp.0": "colwise",
            "stack.*.mlp.2": "rowwise",
            "last": "sequence",
            "vocab_out": "logits",
        },
        "tied": [("vocab_out.weight", "table.weight")] if tied else [],
        "divisible": {"heads": HEADS, "vocabulary": VOCAB},
    }


def build(tied: bool, layers: int, wraps: bool = False) -> Documents:
    torch.manual_seed(2)
    net = Documents(tied, layers, wraps)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


def documents(step: int) -> Tensor:
    """Return ids in runs that end at other places in each row."""
    cuts = torch.rand(ROWS, SEQ, generator=torch.Generator().manual_seed(step)) < 0.2
    return cuts.long().cumsum(1)


@cache
def reference(tied: bool = False, layers: int = 4, wraps: bool = False) -> dict[str, Any]:
    """Train in one process with nothing but torch."""
    net = build(tied, layers, wraps)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2, eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels = batch(step)
        loss = summed_loss(net(tokens, document_ids=documents(step)), labels) / int((labels != -100).sum())
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def microbatches(model: ParallelModel, step: int, count: int) -> tuple[list[Microbatch], int]:
    """Return this rank's microbatches of a step, and what its loss is divided by."""
    tokens, labels = batch(step)
    place = data_axis(model.mesh)
    mine = (x.chunk(place.world)[place.rank].chunk(count) for x in (tokens, labels, documents(step)))
    made = [Microbatch((t,), y, {"document_ids": d}) for t, y, d in zip(*mine, strict=True)]
    return made, int((labels != -100).sum())


def train(
    rank: int,
    world: int,
    degrees: Degrees,
    pipeline: PipelineOptions,
    count: int,
    *,
    tied: bool = False,
    layers: int = 4,
    wraps: bool = False,
    options: ParallelOptions | None = None,
    look: bool = False,
) -> dict[str, Any]:
    """Train the same steps in a pipeline; with `look`, evaluate and predict in between."""
    torch._dynamo.reset()
    options = replace(options or ParallelOptions(), pipeline=pipeline)
    model = parallelize(build(tied, layers, wraps), build_mesh(degrees, "cpu"), plan(tied), options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        mine, scored = microbatches(model, step, count)
        if look and step in (0, 2):
            model.evaluate(mine, summed_loss)
            model.predict(batch(step)[0][:3], document_ids=documents(step)[:3])
        part = model.forward_backward(mine, summed_loss, scored)
        norms.append(float(model.clip_grad_norm(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return {"losses": losses, "norms": norms, "weights": whole(model)}


def train_kw(rank: int, world: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`train` with keyword arguments, which a group does not pass."""
    return train(rank, world, *args, **kwargs)
