"""Cases in which ranks share the sequences of titan-model's decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import titan_model
from titan_model import DecoderConfig
from titan_parallel import Degrees, Microbatch, ParallelOptions, build_mesh, data_axis, parallelize

VOCAB, SEQ, ROWS, STEPS, MAX_NORM = 64, 32, 4, 3, 0.3
FAMILIES = {
    "llama": {"n_kv_heads": 2},
    "qwen3": {"n_kv_heads": 2, "qk_norm": True, "head_dim": 16, "tied_embeddings": True},
}


def build(family: str) -> titan_model.Decoder:
    config = DecoderConfig(
        vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, ffn_dim=48, max_seq_len=SEQ, **FAMILIES[family]
    )
    torch.manual_seed(1)
    model = titan_model.build(config, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def batch(step: int) -> dict[str, Tensor]:
    """Return packed sequences: documents of random lengths, recurring ids, positions that restart with each."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)
    labels = (tokens * 5 + 2) % VOCAB
    labels[torch.rand(ROWS, SEQ, generator=generator) < 0.3] = -100
    runs = (torch.rand(ROWS, SEQ, generator=generator) < 0.15).cumsum(1)
    same = runs[:, :, None] == runs[:, None, :]
    return {"tokens": tokens, "labels": labels, "positions": same.tril().sum(2) - 1, "document_ids": runs % 2}


def total(sums: titan_model.LossSums, _: object) -> Tensor:
    return sums.total


def reference(family: str) -> dict[str, Any]:
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        rows = batch(step)
        loss = model(**rows).total / int((rows["labels"] != -100).sum())
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}


def train(family: str, degrees: Degrees, options: ParallelOptions) -> dict[str, Any]:
    torch._dynamo.reset()
    model = build(family)
    laid_out = parallelize(model, build_mesh(degrees, "cpu"), titan_model.parallel_plan(model.config), options)
    optimizer = torch.optim.AdamW(laid_out.parameters(), lr=1e-2, eps=1e-5)
    place = data_axis(laid_out.mesh)
    losses, norms = [], []
    for step in range(STEPS):
        scored = int((batch(step)["labels"] != -100).sum())
        mine = {name: x.chunk(place.dp_world_size)[place.dp_rank] for name, x in batch(step).items()}
        part = laid_out.forward_backward([Microbatch((mine.pop("tokens"),), None, mine)], total, scored)
        norms.append(float(laid_out.clip_grad_norm(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(laid_out.sum_parts(part)))
    weights = {name: full(p).detach().clone() for name, p in laid_out.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def logits(family: str, degrees: Degrees, options: ParallelOptions) -> Tensor:
    """Return the decoder's logits for sequences of one document each, without positions."""
    model = build(family)
    plan = titan_model.parallel_plan(model.config)
    found: Tensor = parallelize(model, build_mesh(degrees, "cpu"), plan, options).predict(batch(0)["tokens"])
    return found


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
