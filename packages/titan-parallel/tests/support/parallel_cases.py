"""Cases that run on every rank of a group, on a small model that is not a titan model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_mesh import cpu_mesh
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelModel,
    ParallelOptions,
    ParallelPlan,
    data_axis,
    parallelize,
)

VOCAB, DIM, HEADS, SEQ, ROWS, STEPS, MAX_NORM = 32, 32, 4, 16, 8, 3, 0.3
# An eps well above rounding: a key bias has no true gradient, and Adam would amplify its noise to full steps.


class Mixer(nn.Module):
    """Attention with biases, a norm over single heads and a fused mask argument, unlike a Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.head_norm = nn.RMSNorm(DIM // HEADS)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, DIM // HEADS)) for m in (self.query, self.key, self.value))
        q, k, v = (x.transpose(1, 2) for x in (self.head_norm(q), self.head_norm(k), v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mix = Mixer()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x), causal=True)
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, DIM)
        self.stack = nn.ModuleList([Layer() for _ in range(3)])
        self.last = nn.LayerNorm(DIM)
        self.vocab_out = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.vocab_out.weight = self.table.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.stack:
            x = layer(x)
        return self.vocab_out(self.last(x))


def plan(tied: bool) -> ParallelPlan:
    return {
        "blocks": ["stack.*"],
        "before": ["table"],
        "after": ["last", "vocab_out"],
        "tensor": {
            "table": "vocab",
            "stack.*.norm*": "sequence",
            "stack.*.mix": "gather",
            "stack.*.mix.query": "colwise",
            "stack.*.mix.key": "colwise",
            "stack.*.mix.value": "colwise",
            "stack.*.mix.head_norm": "local",
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


def build(tied: bool) -> Net:
    torch.manual_seed(1)
    net = Net(tied)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)
    labels = (tokens * 7 + 1) % VOCAB  # learnable from the token alone
    labels[torch.rand(ROWS, SEQ, generator=generator) < 0.3] = -100  # rows score different numbers of tokens
    return tokens, labels


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def reference(tied: bool = False) -> dict[str, Any]:
    return train_plain(build(tied))


def train_plain(net: nn.Module) -> dict[str, Any]:
    """Train in one process with nothing but torch."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2, eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels = batch(step)
        loss = summed_loss(net(tokens), labels) / int((labels != -100).sum())
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def train(
    degrees: Degrees,
    options: ParallelOptions | None = None,
    tied: bool = False,
    microbatches: int = 1,
) -> dict[str, Any]:
    """Train the same steps laid out over the group."""
    torch._dynamo.reset()
    return train_laid_out(parallelize(build(tied), cpu_mesh(degrees), plan(tied), options), microbatches)


def train_laid_out(model: ParallelModel, microbatches: int = 1) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-5)
    place = data_axis(model.mesh)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels = batch(step)
        scored = int((labels != -100).sum())
        mine = zip(
            *(x.chunk(place.dp_world_size)[place.dp_rank].chunk(microbatches) for x in (tokens, labels)), strict=True
        )
        part = model.forward_backward([Microbatch((t,), y) for t, y in mine], summed_loss, scored)
        norms.append(float(model.clip_grad_norm(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return {"losses": losses, "norms": norms, "weights": full_state(model)}


def full_state(model: ParallelModel) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def fill_from_meta(degrees: Degrees, tied: bool) -> tuple[list[str], list[str], str, bool]:
    """Build on meta, lay out, materialize, fill each local shard with a constant; return names and a digest."""
    with torch.device("meta"):
        net = Net(tied)
    options = ParallelOptions(activation_checkpointing="full", compile_blocks=True, compile_backend="eager")
    model = parallelize(net, cpu_mesh(degrees), plan(tied), options)
    model.materialize("cpu")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(i)
        model.parts[0].scale.fill_(1)
    digest = hashlib.sha256()
    for name, value in full_state(model).items():
        digest.update(f"{name} {value.tolist()}".encode())
    return (
        [name for name, _ in model.named_parameters()],
        list(model.state_dict()),
        digest.hexdigest(),
        model.parts[0].table.weight is model.parts[0].vocab_out.weight,
    )


def evaluate_and_predict(degrees: Degrees) -> tuple[float, Tensor, bool]:
    model = parallelize(build(False), cpu_mesh(degrees), plan(False))
    tokens, labels = batch(0)
    place = data_axis(model.mesh)
    mine = Microbatch(
        (tokens.chunk(place.dp_world_size)[place.dp_rank],), labels.chunk(place.dp_world_size)[place.dp_rank]
    )
    total = float(model.sum_parts(model.evaluate([mine], summed_loss)))
    return total, model.predict(tokens), model.parts[0].training


def state_round_trip(degrees: Degrees) -> bool:
    model = parallelize(build(False), cpu_mesh(degrees), plan(False))
    other = parallelize(build(False), cpu_mesh(degrees), plan(False))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    first, second = full_state(model), full_state(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def bf16_options(options: ParallelOptions | None = None) -> ParallelOptions:
    return replace(options or ParallelOptions(), param_dtype="bfloat16")
