"""Cases of pipelines, on a small model with two tables before its blocks, and documents that attention keeps apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_cases import DIM, HEADS, MAX_NORM, ROWS, SEQ, STEPS, VOCAB, batch, full_state, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelModel,
    ParallelOptions,
    ParallelPlan,
    PipelineOptions,
    data_axis,
    parallelize,
)
from titan_parallel.pipeline.stage import Stage
from titan_parallel.tensor.styles import to_full


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
    mine = (x.chunk(place.dp_world_size)[place.dp_rank].chunk(count) for x in (tokens, labels, documents(step)))
    made = [Microbatch((t,), y, {"document_ids": d}) for t, y, d in zip(*mine, strict=True)]
    return made, int((labels != -100).sum())


@dataclass(frozen=True)
class Case:
    """A way to train: layout, schedule, microbatches of a rank, which model, and whether to look in between."""

    degrees: Degrees
    pipeline: PipelineOptions
    count: int = 4
    tied: bool = False
    layers: int = 4
    wraps: bool = False
    options: ParallelOptions = field(default_factory=ParallelOptions)
    looks: bool = False

    def model(self) -> ParallelModel:
        options = replace(self.options, pipeline=self.pipeline)
        mesh = cpu_mesh(self.degrees)
        return parallelize(build(self.tied, self.layers, self.wraps), mesh, plan(self.tied), options)

    def expected(self) -> dict[str, Any]:
        return reference(self.tied, self.layers, self.wraps)


def train(case: Case) -> dict[str, Any]:
    """Train the same steps in a pipeline; evaluate and predict in between, if the case says so."""
    torch._dynamo.reset()
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        mine, scored = microbatches(model, step, case.count)
        if case.looks and step in (0, 2):
            model.evaluate(mine, summed_loss)
            model.predict(batch(step)[0][:3], document_ids=documents(step)[:3])
        part = model.forward_backward(mine, summed_loss, scored)
        norms.append(float(model.clip_grad_norm(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return {"losses": losses, "norms": norms, "weights": full_state(model)}


def evaluate_and_predict(case: Case) -> tuple[float, Tensor, list[bool]]:
    """Evaluate in one microbatch more than the schedule may take, and predict."""
    model = case.model()
    mine, _ = microbatches(model, 0, case.count)
    total = float(model.sum_parts(model.evaluate(mine, summed_loss)))
    logits = model.predict(batch(0)[0], document_ids=documents(0))
    return total, logits, [part.training for part in model.parts]


def fill_from_meta(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Build on meta, lay out, allocate, fill by name; return the parameters, the state after a load, and logits."""
    with torch.device("meta"):
        net = Documents(case.tied, case.layers, case.wraps)
    options = replace(case.options, pipeline=case.pipeline)
    model = parallelize(net, cpu_mesh(case.degrees), plan(case.tied), options)
    model.materialize("cpu")
    values = {**build(case.tied, case.layers).state_dict()}
    _fill(model, values)
    logits = model.predict(batch(0)[0], document_ids=documents(0))
    parameters = full_state(model)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert torch.equal(model.predict(batch(0)[0], document_ids=documents(0)), logits)
    return parameters, {name: to_full(value) for name, value in model.state_dict().items()}, logits


def _fill(model: ParallelModel, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if isinstance(value, DTensor):
                value.copy_(distribute_tensor(values[name], value.device_mesh, value.placements))
            else:
                value.copy_(values[name])


def gradients(case: Case, calls: int) -> dict[str, Tensor]:
    """Return the gradients after `calls` calls for one step."""
    model = case.model()
    mine, scored = microbatches(model, 0, case.count)
    for _ in range(calls):
        model.forward_backward(mine, summed_loss, scored)
    return {name: to_full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def halves(case: Case) -> dict[int, bool | None]:
    """Return for each stage here whether its backward was run in two halves."""
    model = case.model()
    model.forward_backward(*_step(model, case.count))
    stages: dict[int, Stage] = model._run._stages
    return {index: stage.splits_backward for index, stage in stages.items()}


class Sent(TorchDispatchMode):
    """Keeps the shapes of what is sent from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::send":
            self.shapes.append(list(args[0][0].shape))
        return func(*args, **(kwargs or {}))


def sent_shapes(case: Case) -> list[list[int]]:
    """Return the shapes of what this rank sent to other stages in one step, forth and back."""
    model = case.model()
    step = _step(model, case.count)
    model.forward_backward(*step)
    with Sent() as sent:
        model.forward_backward(*step)
    return sent.shapes


def other_shapes(case: Case) -> list[float]:
    """Train on rows of other lengths in each step, which differ between data ranks too; return the losses."""
    model = case.model()
    place = data_axis(model.mesh)
    losses = []
    for lengths in ((16, 8), (8, 8), (16, 12), (8, 16)):
        length = lengths[place.dp_rank % 2]
        tokens, labels = (x.chunk(place.dp_world_size)[place.dp_rank][:, :length] for x in batch(0))
        ids = torch.zeros_like(tokens)
        mine = [
            Microbatch((t,), y, {"document_ids": d})
            for t, y, d in zip(tokens.chunk(case.count), labels.chunk(case.count), ids.chunk(case.count), strict=True)
        ]
        losses.append(float(model.sum_parts(model.forward_backward(mine, summed_loss, 1.0))))
    return losses


def _step(model: ParallelModel, count: int) -> tuple[list[Microbatch], Callable[[Tensor, Tensor], Tensor], int]:
    mine, scored = microbatches(model, 0, count)
    return mine, summed_loss, scored


class Shrinking(nn.Linear):
    def __init__(self) -> None:
        super().__init__(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x)[:, 1:]


class Keeping(Layer):
    """Keeps something of what it computes in an attribute, as mixtures do with a loss of their own."""

    def __init__(self) -> None:
        super().__init__(wraps=False)
        self.kept: Any = 0.0

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        x = super().forward(x, mask)
        self.kept = x.square().mean()
        return x


class _Once(torch.autograd.Function):
    """A product whose backward runs once, as that of many a fused loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.kept = x, weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.kept
        del ctx.kept
        return grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)


class Once(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(x, self.weight)


class Turn(nn.Module):
    """A table without parameters, as of rotary angles."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 1 + torch.arange(tokens.shape[1]).remainder(3)[:, None]


class Odd(Documents):
    """What a pipeline cannot take, one `kind` at a time; or what it takes in another way."""

    def __init__(self, kind: str) -> None:
        super().__init__(False, 4)
        self.kind = kind
        self.turn = Turn()
        if kind == "once":
            self.vocab_out = Once(DIM, VOCAB, bias=False)
        if kind == "kept":
            self.stack = nn.ModuleList([Keeping() for _ in range(4)])
        if kind == "stray":
            self.shift = nn.Parameter(torch.zeros(DIM))
        if kind == "twice":
            for layer in self.stack:
                layer.norm2 = layer.norm1
        if kind == "again":
            self.stack[2] = self.stack[0]
        if kind == "shrinks":
            self.stack[0] = Shrinking()

    def forward(self, tokens: Tensor, *, document_ids: Tensor) -> Tensor:
        if self.kind == "broken":
            raise ValueError("no forward today")
        same = (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        mask = same + self.places.weight.sum() * 0 if self.kind == "second" else same
        begun = x
        for layer in self.stack:
            x = layer(x, mask)
        if self.kind == "late":
            raise ValueError("no head today")
        if self.kind == "skip":
            x = x + begun
        if self.kind == "turned":
            x = x * self.turn(tokens)
        return self.vocab_out(self.last(x)) + sum(layer.kept for layer in self.stack if self.kind == "kept")


def refusal(kind: str, changed: ParallelPlan, options: ParallelOptions, count: int) -> str:
    """Return the message of what goes wrong, on every rank alike."""
    torch.manual_seed(0)
    net = Odd(kind)
    try:
        model = parallelize(net, cpu_mesh(Degrees(pp=2)), {**plan(False), **changed}, options)
        mine, scored = microbatches(model, 0, count)
        if kind == "shapes":
            mine[1] = Microbatch((mine[1].args[0][:, :4],), mine[1].target[:, :4], {"document_ids": mine[1].args[0]})
            mine[1] = replace(mine[1], kwargs={"document_ids": torch.zeros_like(mine[1].args[0])})
        model.forward_backward(mine, summed_loss, scored)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def odd_gradients(kind: str, schedule: str) -> dict[str, Tensor]:
    """Return gradients of an odd model in a pipeline or (no schedule) by torch alone."""
    torch.manual_seed(4)
    net = Odd(kind)
    tokens, labels = batch(0)
    if not schedule:
        summed_loss(net(tokens, document_ids=documents(0)), labels).backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    options = ParallelOptions(pipeline=PipelineOptions(schedule=schedule))
    laid: ParallelPlan = {**plan(False), "before": ["table", "places", "turn"]}
    model = parallelize(net, cpu_mesh(Degrees(pp=dist.get_world_size())), laid, options)
    model.forward_backward(microbatches(model, 0, 4)[0], summed_loss, 1.0)
    return {name: to_full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def actions(case: Case) -> list[str]:
    """Return what a rank does in a step, in torch's words."""
    rank = dist.get_rank()
    model = case.model()
    model.forward_backward(*_step(model, case.count))
    _, built = model._run._built
    return [str(action) for action in built._schedule.pipeline_order_with_comms[rank]]
