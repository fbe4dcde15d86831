"""Cases of context parallelism, on a small transformer with grouped heads, rotary positions and packed documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_cases import full_state, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import (
    Degrees,
    LayoutError,
    Microbatch,
    ParallelOptions,
    ParallelPlan,
    context_attention,
    data_axis,
    parallelize,
)
from titan_parallel.context.layout import is_balanced, take_part

VOCAB, DIM, HEADS, KV_HEADS, SEQ, ROWS, STEPS, MAX_NORM = 32, 32, 4, 2, 16, 4, 3, 0.3
HEAD_DIM = DIM // HEADS


def dense_mask(document_ids: Tensor) -> Tensor:
    """Return which keys each query sees, bool `[B, 1, S, S]`, worked out token by token."""
    rows, length = document_ids.shape
    allowed = torch.zeros(rows, length, length, dtype=torch.bool)
    for row, ids in enumerate(document_ids.tolist()):
        begin = 0
        for query in range(length):
            if query and ids[query] != ids[query - 1]:
                begin = query
            allowed[row, query, begin : query + 1] = True
    return allowed[:, None]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
    if document_ids is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(document_ids), enable_gqa=True)


@dataclass
class Documents:
    document_ids: Tensor | None


class Core(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Documents | None) -> Tensor:
        return plain_attention(q, k, v, None if mask is None else mask.document_ids)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.key, self.value = (nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.core = Core()

    def forward(self, x: Tensor, angles: Tensor, mask: Documents | None) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for m in (self.query, self.key, self.value))
        out = self.core(rotate(q, angles), rotate(k, angles), v, mask)
        return self.out(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    even, odd = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1).type_as(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, angles: Tensor, mask: Documents | None) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, mask)
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, DIM)
        self.stack = nn.ModuleList([Layer() for _ in range(2)])
        self.last = nn.RMSNorm(DIM)
        self.vocab_out = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, *, places: Tensor | None = None) -> Tensor:
        if places is None:
            places = torch.arange(tokens.shape[1])[None]
        angles = places[..., None] / 10.0 ** torch.arange(HEAD_DIM // 2)
        x = self.table(tokens)
        mask = None if document_ids is None else Documents(document_ids)
        for layer in self.stack:
            x = layer(x, angles, mask)
        return self.vocab_out(self.last(x))


PLAN: ParallelPlan = {
    "blocks": ["stack.*"],
    "before": ["table"],
    "after": ["last", "vocab_out"],
    "tensor": {
        "table": "vocab",
        "stack.*.norm*": "sequence",
        "stack.*.attn": "gather",
        "stack.*.attn.query": "colwise",
        "stack.*.attn.key": "colwise",
        "stack.*.attn.value": "colwise",
        "stack.*.attn.out": "rowwise",
        "stack.*.mlp": "gather",
        "stack.*.mlp.0": "colwise",
        "stack.*.mlp.2": "rowwise",
        "last": "sequence",
        "vocab_out": "logits",
    },
    "divisible": {"heads": HEADS, "key/value heads": KV_HEADS, "vocabulary": VOCAB},
    "attention": ["stack.*.attn.core"],
    "sequence": {"tokens": 1, "document_ids": 1, "places": 1, "target": 1},
    "positions": "places",
    "heads": (HEADS, KV_HEADS),
}


def build() -> Net:
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


def documents(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Return ids of runs of random lengths; few ids, so that runs of the same id meet once a sequence is cut."""
    changes = torch.rand(rows, length, generator=generator) < 0.2
    return changes.cumsum(1) % 2


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)
    labels = (tokens * 7 + 1) % VOCAB  # learnable from the token alone
    labels[torch.rand(ROWS, SEQ, generator=generator) < 0.3] = -100
    return tokens, documents(ROWS, SEQ, generator), labels


def reference(masked: bool = True) -> dict[str, Any]:
    """Train in one process with nothing but torch."""
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2, eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, ids, labels = batch(step)
        loss = summed_loss(net(tokens, ids if masked else None), labels) / int((labels != -100).sum())
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def train(degrees: Degrees, options: ParallelOptions, masked: bool = True, microbatches: int = 1) -> dict[str, Any]:
    """Train the same steps laid out over the group."""
    torch._dynamo.reset()
    model = parallelize(build(), cpu_mesh(degrees), PLAN, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-5)
    place = data_axis(model.mesh)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, ids, labels = batch(step)
        scored = int((labels != -100).sum())
        mine = zip(
            *(x.chunk(place.dp_world_size)[place.dp_rank].chunk(microbatches) for x in (tokens, ids, labels)),
            strict=True,
        )
        step_parts = [Microbatch((t, i) if masked else (t,), y) for t, i, y in mine]
        part = model.forward_backward(step_parts, summed_loss, scored)
        norms.append(float(model.clip_grad_norm(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return {"losses": losses, "norms": norms, "weights": full_state(model)}


def attention(
    kind: str, sizes: tuple[int, int, int, int, int], ids: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Attend from this rank's part of made-up inputs; return the output and the gradients of q, k and v."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    balanced = is_balanced(kind)
    mine = [take_part(x, 2, rank, world_size, balanced=balanced).to(dtype) for x in inputs(sizes)]
    q, k, v = (x.requires_grad_() for x in mine[:3])
    part = None if ids is None else take_part(ids, 1, rank, world_size, balanced=balanced)
    out = context_attention(q, k, v, part, group=torch.distributed.group.WORLD, kind=kind)
    out.backward(mine[3])
    assert out.dtype == q.grad.dtype == k.grad.dtype == v.grad.dtype == dtype
    return tuple(x.detach().float() for x in (out, q.grad, k.grad, v.grad))


def inputs(sizes: tuple[int, int, int, int, int]) -> list[Tensor]:
    """Return q, k, v and a gradient of the output, laid out as a model's projections lay them."""
    rows, heads, kv_heads, length, width = sizes
    generator = torch.Generator().manual_seed(length)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]


def expected_attention(sizes: tuple[int, int, int, int, int], ids: Tensor | None) -> tuple[Tensor, ...]:
    *leaves, grad = inputs(sizes)
    leaves = [x.requires_grad_() for x in leaves]
    out = plain_attention(*leaves, ids)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def evaluate_and_predict(degrees: Degrees, kind: str) -> tuple[float, Tensor, Tensor]:
    """Return the loss of an evaluation, and what predictions give, positions given and not."""
    model = parallelize(build(), cpu_mesh(degrees), PLAN, ParallelOptions(context=kind))
    tokens, ids, labels = batch(0)
    place = data_axis(model.mesh)
    mine = [x.chunk(place.dp_world_size)[place.dp_rank] for x in (tokens, ids, labels)]
    total = float(model.sum_parts(model.evaluate([Microbatch((mine[0], mine[1]), mine[2])], summed_loss)))
    places = torch.arange(SEQ).expand(ROWS, -1)
    return total, model.predict(tokens, document_ids=ids), model.predict(tokens, ids, places=places)


def refusal(changed: ParallelPlan, kind: str) -> str:
    """Return the message that `parallelize` refuses with, on every rank."""
    world_size = dist.get_world_size()
    merged: ParallelPlan = {**PLAN, **changed}
    try:
        parallelize(build(), cpu_mesh(Degrees(cp=world_size)), merged, ParallelOptions(context=kind))
    except LayoutError as error:
        return str(error)
    return ""


def wrong_calls() -> list[str]:
    """Return what calls are answered with that give nothing to cut, or nothing that can be."""
    world_size = dist.get_world_size()
    model = parallelize(build(), cpu_mesh(Degrees(cp=world_size)), PLAN)
    tokens, ids, labels = batch(0)
    messages = []
    for microbatch in (
        Microbatch((tokens[:, :6], ids[:, :6]), labels[:, :6]),
        Microbatch((tokens, ids[:, :8]), labels),
        Microbatch((tokens, ids), labels[:, :8]),
        Microbatch((None,), labels),
        Microbatch((tokens, ids, ids), labels),
    ):
        try:
            model.forward_backward([microbatch], summed_loss, 1.0)
        except LayoutError as error:
            messages.append(str(error))
    return messages


class Count:
    """Stands in for a function of torch.distributed and notes the bytes that each call is given to send."""

    def __init__(self, real: Any, sent: Any) -> None:
        self.real, self.sent, self.calls = real, sent, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(sum(x.nbytes for x in self.sent([*args, *kwargs.values()])))
        return self.real(*args, **kwargs)


SENDERS = {
    "all_gather_into_tensor": lambda given: given[1:2],  # output, input
    "reduce_scatter_tensor": lambda given: given[1:2],
    "all_to_all_single": lambda given: given[1:2],
    "batch_isend_irecv": lambda given: [step.tensor for step in given[0] if step.op is torch.distributed.isend],
}


def traffic(
    kind: str, sizes: tuple[int, int, int, int, int], masked: bool
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the bytes of each call that attention makes, forward and backward."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = [take_part(x, 2, rank, world_size, balanced=is_balanced(kind)).requires_grad_() for x in inputs(sizes)]
    ids = torch.zeros(sizes[0], sizes[3] // world_size, dtype=torch.int64) if masked else None
    with counted() as forward:
        out = context_attention(*mine[:3], ids, group=torch.distributed.group.WORLD, kind=kind)
    with counted() as backward:
        out.backward(mine[3])
    calls = [{name: count.calls for name, count in some.items() if count.calls} for some in (forward, backward)]
    return calls[0], calls[1]


@contextmanager
def counted() -> Iterator[dict[str, Count]]:
    counts = {name: Count(getattr(torch.distributed, name), sent) for name, sent in SENDERS.items()}
    with ExitStack() as stack:
        for name, count in counts.items():
            stack.enter_context(mock.patch.object(torch.distributed, name, count))
        yield counts


def ring_steps(options: ParallelOptions) -> int:
    """Return how many times a step of training passes something around the ring."""
    world_size = dist.get_world_size()
    model = parallelize(build(), cpu_mesh(Degrees(cp=world_size)), PLAN, options)
    tokens, ids, labels = batch(0)
    with counted() as counts:
        model.forward_backward([Microbatch((tokens, ids), labels)], summed_loss, 1.0)
    return len(counts["batch_isend_irecv"].calls)
