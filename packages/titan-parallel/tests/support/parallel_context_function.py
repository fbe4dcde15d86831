"""A model of `transformers` whose attention is a function that calls `context_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_cases import full_state
from parallel_mesh import cpu_mesh
from parallel_transformers import EPS, LLAMA, ROWS, SEQ, STEPS, batch, build, summed_loss
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelOptions,
    ParallelPlan,
    context_attention,
    data_axis,
    parallelize,
)

PLAN: ParallelPlan = {
    **LLAMA,
    "attention": [],  # the model calls `context_attention` itself
    "sequence": {"input_ids": 1, "position_ids": 1, "target": 1},
    "positions": "position_ids",
    "heads": (4, 2),
}


def train(degrees: Degrees, options: ParallelOptions) -> tuple[list[float], dict[str, Tensor], Tensor]:
    from transformers import AttentionInterface

    mesh = cpu_mesh(degrees)
    group: ProcessGroup = mesh["cp"].get_group()

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out = context_attention(q, k, v, group=group, kind=options.context, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("context", attend)
    plain = build("Llama")
    plain.set_attn_implementation("context")
    model = parallelize(plain, mesh, PLAN, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    place = data_axis(mesh)
    losses = []
    for step in range(STEPS):
        tokens, labels = (x.chunk(place.dp_world_size)[place.dp_rank] for x in batch(step))
        part = model.forward_backward([Microbatch((tokens,), labels)], summed_loss, ROWS * SEQ)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return losses, full_state(model), model.predict(batch(0)[0]).logits
