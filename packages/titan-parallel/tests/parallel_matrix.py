"""The matrix: every kind of parallelism alone, in pairs and in products, against one process.

Each case is a layout, what is trained on it, and how. The README's table of what works together is made of this list
(`parallel_table.py`), so a product that is not trained here is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import parallel_net as net
from parallel_net import Shape
from titan_parallel import Degrees, Microbatch, ParallelOptions, ParallelPlan, build_mesh, data_axis, parallelize

DENSE, MOE = Shape(), Shape(moe=True)


@dataclass(frozen=True)
class Case:
    """One layout and what runs on it.

    Attributes:
        degrees: All given, `dp_shard` too.
        shape: What is trained.
        options: How.
        microbatches: Of each rank and step.
        slow: Whether it is left to the long set.
    """

    degrees: Degrees
    shape: Shape = DENSE
    options: ParallelOptions = field(default_factory=ParallelOptions)
    microbatches: int = 1
    slow: bool = False

    @property
    def world(self) -> int:
        d = self.degrees
        return d.dp_replicate * d.dp_shard * d.ep * d.cp * d.tp * d.pp

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parallelism that take part, in one order."""
        return tuple(kind for kind, name in KINDS.items() if getattr(self.degrees, name) > 1)


KINDS = {"replicate": "dp_replicate", "FSDP": "dp_shard", "TP": "tp", "PP": "pp", "CP": "cp", "EP": "ep"}


def plan(shape: Shape) -> ParallelPlan:
    mlp = {"stack.*.mlp.gate": "colwise", "stack.*.mlp.up": "colwise", "stack.*.mlp.down": "rowwise"}
    return {
        "blocks": ["stack.*"],
        "before": ["table"],
        "after": ["last", "unembed"],
        "tensor": {
            "table": "vocab",
            "stack.*.norm*": "sequence",
            "stack.*.attention": "gather",
            "stack.*.attention.q": "colwise",
            "stack.*.attention.k": "colwise",
            "stack.*.attention.v": "colwise",
            "stack.*.attention.head_norm": "local",
            "stack.*.attention.out": "rowwise",
            "stack.*.mlp": "gather",
            **mlp,
            "last": "sequence",
            "unembed": "logits",
        },
        "tied": [("unembed.weight", "table.weight")] if shape.tied else [],
        "divisible": {"heads": net.HEADS, "key/value heads": net.KV_HEADS, "vocabulary": net.VOCAB},
        "attention": ["stack.*.attention.core"],
        "sequence": {"tokens": 1, "positions": 1, "document_ids": 1, "target": 1},
        "positions": "positions",
        "heads": (net.HEADS, net.KV_HEADS),
        "experts": ["stack.*.mlp.experts"] if shape.moe else [],
    }


def train(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Train the steps of `parallel_net.reference`, laid out over the group."""
    torch._dynamo.reset()
    mesh = build_mesh(case.degrees, "cpu")
    model = parallelize(net.build(case.shape), mesh, plan(case.shape), case.options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=net.EPS)
    place = data_axis(mesh)
    losses, norms = [], []
    for step in range(net.STEPS):
        given = net.batch(step, case.shape)
        scored = int((given["labels"] != -100).sum())
        rows = {name: x.chunk(place.world)[place.rank].chunk(case.microbatches) for name, x in given.items()}
        labels, tokens = rows.pop("labels"), rows.pop("tokens")
        mine = [
            Microbatch((tokens[i],), labels[i], {name: x[i] for name, x in rows.items()})
            for i in range(case.microbatches)
        ]
        part = model.forward_backward(mine, net.summed_loss, scored)
        norms.append(float(model.clip_grad_norm(net.MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return {"losses": losses, "norms": norms, "weights": weights}
