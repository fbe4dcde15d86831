"""The matrix: every kind of parallelism alone, in pairs and in products, against one process.

Each case is a layout, what is trained on it, and how. The README's table of what works together is made of this list
(`parallel_table.py`), so a product that is not trained here is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import parallel_net as net
from parallel_mesh import cpu_mesh
from parallel_net import Shape
from titan_parallel import (
    SCHEDULES,
    Degrees,
    Microbatch,
    ParallelOptions,
    ParallelPlan,
    PipelineOptions,
    data_axis,
    parallelize,
)

DENSE, MOE = Shape(), Shape(moe=True)


@dataclass(frozen=True)
class Case:
    """One layout and what runs on it.

    Attributes:
        degrees: All given, `dp_shard` too.
        shape: What is trained.
        options: How.
        microbatches: Of each rank and step.
        mark: The set that it is left to, `slow` or `nightly`; empty for one that always runs.
    """

    degrees: Degrees
    shape: Shape = DENSE
    options: ParallelOptions = field(default_factory=ParallelOptions)
    microbatches: int = 1
    mark: str = ""

    @property
    def world(self) -> int:
        d = self.degrees
        return d.dp_replicate * d.dp_shard * d.ep * d.cp * d.tp * d.pp

    def __str__(self) -> str:
        parts = [" x ".join(f"{kind}{getattr(self.degrees, KINDS[kind])}" for kind in self.kinds)]
        changed = [f for f in fields(self.options) if getattr(self.options, f.name) != f.default]
        parts += [f"{f.name}={getattr(self.options, f.name)}" for f in changed if f.name not in _BESIDE]
        if self.degrees.pp > 1:
            parts.append(self.options.pipeline.schedule)
        parts += ["MoE"] * self.shape.moe + ["tied"] * self.shape.tied
        parts += [f"{self.microbatches} microbatches"] * (self.microbatches > 1 and self.degrees.pp == 1)
        return " ".join(parts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parallelism that take part, in one order."""
        return tuple(kind for kind, name in KINDS.items() if getattr(self.degrees, name) > 1)


KINDS = {"DDP": "dp_replicate", "FSDP": "dp_shard", "TP": "tp", "PP": "pp", "CP": "cp", "EP": "ep"}


MODES = {"full": "nightly", "selective": "slow"}  # of activation checkpointing, and the set that has it


_BESIDE = ("pipeline", "compile_backend")  # said otherwise, or not worth a word


def layout(*, shape: Shape | None = None, microbatches: int = 0, mark: str = "", **given: Any) -> Case:
    """Make a case of degrees, which default to 1, and options; pipelines take four microbatches if they can."""
    degrees = Degrees(**{"dp_shard": 1, **{name: n for name, n in given.items() if name in KINDS.values()}})
    options = ParallelOptions(**{name: value for name, value in given.items() if name not in KINDS.values()})
    shape = shape or (MOE if degrees.ep > 1 else DENSE)
    return Case(
        degrees,
        shape,
        options,
        microbatches or (min(4, net.ROWS // degrees.dp_world_size) if degrees.pp > 1 else 1),
        mark,
    )


def cases() -> Iterator[Case]:
    """Yield the matrix."""
    yield from (layout(**{degree: 2}) for degree in KINDS.values())
    for first, second in combinations(KINDS.values(), 2):
        always = (first, second) in (("dp_shard", "tp"), ("dp_shard", "pp"))
        yield layout(**{first: 2, second: 2}, mark="" if always else "slow")
    # Each kind's own variety.
    yield from (layout(cp=2, context=kind) for kind in ("ring", "ulysses"))
    yield layout(cp=4, context="ring", mark="slow")
    yield from (layout(cp=4, context=kind, mark="nightly") for kind in ("allgather", "ulysses"))
    for schedule in SCHEDULES:
        if schedule != "1F1B":
            fast = schedule in ("Interleaved1F1B", "ZBVZeroBubble")
            yield layout(pp=2, pipeline=PipelineOptions(schedule=schedule), mark="" if fast else "slow")
    yield layout(pp=4, mark="slow")
    yield layout(tp=4, mark="slow")
    yield layout(tp=2, sequence_parallel=False, mark="slow")
    yield layout(ep=4, mark="slow")
    # With what else there is to choose.
    both = {"tp": 2, "cp": 2}
    for degree, mark in (("dp_shard", ""), ("tp", "slow"), ("pp", "")):
        yield layout(**{degree: 2}, shape=Shape(tied=True), mark=mark)
    yield layout(dp_shard=2, microbatches=4)
    yield from (layout(**both, microbatches=2, context=kind, mark="nightly") for kind in ("ring", "ulysses"))
    yield from (layout(**both, activation_checkpointing=mode, mark=mark) for mode, mark in MODES.items())
    yield from (layout(ep=2, tp=2, activation_checkpointing=mode, mark="nightly") for mode in MODES)
    yield from (layout(pp=2, dp_shard=2, activation_checkpointing=mode, mark=mark) for mode, mark in MODES.items())
    compiled = {"compile_blocks": True, "compile_backend": "aot_eager"}
    for degree, mark in (("tp", "slow"), ("pp", "nightly"), ("cp", "nightly"), ("ep", "slow")):
        yield layout(**{degree: 2, "dp_shard": 2}, **compiled, mark=mark)
    yield layout(pp=2, dp_shard=2, shape=Shape(tied=True), mark="slow")
    yield layout(pp=2, tp=2, shape=Shape(tied=True), mark="nightly")
    # Products of three, on eight processes.
    yield layout(dp_shard=2, tp=2, pp=2, mark="slow")
    for degrees in (
        ("dp_replicate", "dp_shard", "tp"),
        ("dp_shard", "cp", "tp"),
        ("dp_shard", "pp", "cp"),
        ("dp_shard", "ep", "pp"),
        ("dp_replicate", "dp_shard", "ep"),
        ("dp_shard", "ep", "tp"),
        ("tp", "pp", "cp"),
    ):
        yield layout(**dict.fromkeys(degrees, 2), mark="nightly")


def plan(shape: Shape) -> ParallelPlan:
    inner = {"stack.*.mlp.gate": "colwise", "stack.*.mlp.up": "colwise", "stack.*.mlp.down": "rowwise"}
    mlp = {"stack.*.mlp": "gather", **inner}
    if shape.moe:
        mlp = {
            "stack.*.mlp": "mixture",
            "stack.*.mlp.router": "router",
            "stack.*.mlp.experts.up": "colwise",
            "stack.*.mlp.experts.down": "rowwise",
            **{name.replace(".mlp.", ".mlp.shared."): style for name, style in inner.items()},
        }
    return {
        "blocks": ["stack.*"],
        "before": ["table"],
        "after": ["last", "unembed"],
        "tensor": {
            "table": "vocab",
            "stack.*.norm*": "sequence",
            "stack.*.attention": "gather",
            "stack.*.attention.q": "colwise",
            "stack.*.attention.k": "colwise_kv",
            "stack.*.attention.v": "colwise_kv",
            "stack.*.attention.head_norm": "local",
            "stack.*.attention.out": "rowwise",
            **mlp,
            "last": "sequence",
            "unembed": "logits",
        },
        "tied": [("unembed.weight", "table.weight")] if shape.tied else [],
        "divisible": {"heads": net.HEADS, "vocabulary": net.VOCAB},
        "attention": ["stack.*.attention.core"],
        "sequence": {"tokens": 1, "positions": 1, "document_ids": 1, "target": 1},
        "positions": "positions",
        "heads": (net.HEADS, net.KV_HEADS),
        **({"experts": ["stack.*.mlp.experts"], "n_experts": net.EXPERTS} if shape.moe else {}),
    }


def train(case: Case) -> dict[str, Any]:
    """Train the steps of `parallel_net.reference`, laid out over the group."""
    torch._dynamo.reset()
    mesh = cpu_mesh(case.degrees)
    model = parallelize(net.build(case.shape), mesh, plan(case.shape), case.options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=net.EPS)
    place = data_axis(mesh)
    losses, norms = [], []
    for step in range(net.STEPS):
        given = net.batch(step, case.shape)
        scored = int((given["labels"] != -100).sum())
        rows = {name: x.chunk(place.dp_world_size)[place.dp_rank].chunk(case.microbatches) for name, x in given.items()}
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
