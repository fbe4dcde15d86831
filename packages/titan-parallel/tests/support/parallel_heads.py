"""Cases with fewer key/value heads than ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel_cases as cases
from parallel_cases import DIM, HEADS, Mixer, Net, batch, full_state, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelOptions,
    ParallelPlan,
    data_axis,
    parallelize,
)

WIDTH = DIM // HEADS


class GroupedMixer(Mixer):
    """Attention in which several query heads look at one key/value head."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.key, self.value = (nn.Linear(DIM, kv_heads * WIDTH) for _ in range(2))
        self.value.bias = None

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, WIDTH)) for m in (self.query, self.key, self.value))
        q, k, v = (x.transpose(1, 2) for x in (self.head_norm(q), self.head_norm(k), v))
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))


def plan(kv_heads: int) -> ParallelPlan:
    base = cases.plan(False)
    tensor = {**base["tensor"], "stack.*.mix.key": "colwise_kv", "stack.*.mix.value": "colwise_kv"}
    return {**base, "tensor": tensor, "heads": (HEADS, kv_heads)}


def build(kv_heads: int) -> Net:
    torch.manual_seed(1)
    net = Net(False)
    for layer in net.stack:
        layer.mix = GroupedMixer(kv_heads)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


def reference(kv_heads: int) -> dict[str, Any]:
    return cases.train_plain(build(kv_heads))


def train(
    degrees: Degrees,
    kv_heads: int,
    options: ParallelOptions | None = None,
    microbatches: int = 1,
) -> dict[str, Any]:
    torch._dynamo.reset()
    model = parallelize(build(kv_heads), cpu_mesh(degrees), plan(kv_heads), options)
    return cases.train_laid_out(model, microbatches)


def held(degrees: Degrees, kv_heads: int) -> dict[str, Any]:
    """Return what of the first key projection this rank holds, and whether state comes through a round trip."""
    plain, mesh = build(kv_heads), cpu_mesh(degrees)
    model, other = (parallelize(build(kv_heads), mesh, plan(kv_heads)) for _ in range(2))
    weight = dict(model.named_parameters())["stack.0.mix.key.weight"]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    loaded = full_state(other)
    tokens, labels = batch(0)
    place = data_axis(mesh)
    mine = [
        Microbatch(
            (tokens.chunk(place.dp_world_size)[place.dp_rank],), labels.chunk(place.dp_world_size)[place.dp_rank]
        )
    ]
    return {
        "shape": tuple(weight.shape),
        "local": (weight.to_local() if isinstance(weight, DTensor) else weight).detach().clone(),
        "same": all(torch.equal(loaded[name], value) for name, value in plain.named_parameters()),
        "tp": mesh["tp"].get_local_rank(),
        "loss": float(model.sum_parts(model.evaluate(mine, summed_loss))),
    }
