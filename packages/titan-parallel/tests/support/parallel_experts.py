"""A mixture of experts that is not a titan model, and cases that train it on every rank of a group."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_cases import MAX_NORM, STEPS, batch, full_state, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import (
    Degrees,
    LayoutError,
    Microbatch,
    ParallelModel,
    ParallelOptions,
    ParallelPlan,
    data_axis,
    parallelize,
)
from titan_parallel.expert.all_to_all import with_exchange

VOCAB, DIM, INNER, EXPERTS, CHOSEN = 32, 32, 24, 8, 2


class Gate(nn.Module):
    """Chooses experts in fp32; a loss of its own, for even load, starts in its backward and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(EXPERTS, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), self.matrix.float()).softmax(-1)  # [T, E]
        weights, chosen = scores.topk(CHOSEN)
        return OwnLoss.apply(weights / weights.sum(-1, keepdim=True), 1e-3 * scores.square().sum()), chosen


class OwnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=grad.dtype)


class Experts(nn.Module):
    """Experts with biases, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.wide_bias = (nn.Parameter(torch.empty(EXPERTS, INNER, *more)) for more in ((DIM,), ()))
        self.narrow, self.narrow_bias = (nn.Parameter(torch.empty(EXPERTS, DIM, *more)) for more in ((INNER,), ()))
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        self.seen.append(counts.tolist())
        weights = (self.wide, self.wide_bias, self.narrow, self.narrow_bias)
        parts = zip(x.split(counts.tolist()), *weights, strict=True)  # as many counts as there are weights here
        return torch.cat([F.linear(F.gelu(F.linear(rows, w, b)), n, c) for rows, w, b, n, c in parts if len(rows)])


class GatheredExperts(nn.Module):
    """Experts of which each row takes the weights that it needs, in one graph whatever the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.empty(EXPERTS, INNER, DIM))
        self.narrow = nn.Parameter(torch.empty(EXPERTS, DIM, INNER))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        of = torch.searchsorted(counts.cumsum(0), torch.arange(len(x)), right=True)
        inner = F.gelu(torch.bmm(self.wide[of], x[..., None]))
        return torch.bmm(self.narrow[of], inner)[..., 0]


class Mixture(nn.Module):
    def __init__(self, gathered: bool) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = GatheredExperts() if gathered else Experts()
        self.beside = nn.Sequential(nn.Linear(DIM, INNER), nn.GELU(), nn.Linear(INNER, DIM))
        self.scale = nn.Parameter(torch.empty(DIM))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat)
        order = chosen.flatten().argsort(stable=True)
        counts = F.one_hot(chosen.flatten(), EXPERTS).sum(0)
        rows = self.experts(flat[order // CHOSEN], counts)
        weighted = rows * weights.flatten()[order, None].to(rows.dtype)
        mixed = torch.zeros_like(flat).index_add(0, order // CHOSEN, weighted)
        return (mixed * self.scale).view_as(x) + self.beside(x)


class Layer(nn.Module):
    def __init__(self, gathered: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.dense = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.mixture = Mixture(gathered)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(self.norm1(x))
        return x + self.mixture(self.norm2(x))


class Net(nn.Module):
    def __init__(self, gathered: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, DIM)
        self.stack = nn.ModuleList([Layer(gathered) for _ in range(2)])
        self.last = nn.LayerNorm(DIM)
        self.vocab_out = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.stack:
            x = layer(x)
        return self.vocab_out(self.last(x))


BIASES = {"stack.*.mixture.experts.wide_bias": "colwise", "stack.*.mixture.experts.narrow_bias": "rowwise"}


def plan(gathered: bool = False) -> ParallelPlan:
    return {
        "blocks": ["stack.*"],
        "before": ["table"],
        "after": ["last", "vocab_out"],
        "tensor": {
            "table": "vocab",
            "stack.*.norm*": "sequence",
            "stack.*.dense": "gather",
            "stack.*.dense.0": "colwise",
            "stack.*.dense.2": "rowwise",
            "stack.*.mixture": "mixture",
            "stack.*.mixture.gate": "router",
            "stack.*.mixture.scale": "replicate",
            "stack.*.mixture.experts.wide": "colwise",
            "stack.*.mixture.experts.narrow": "rowwise",
            "stack.*.mixture.beside.0": "colwise",
            "stack.*.mixture.beside.2": "rowwise",
            "last": "sequence",
            "vocab_out": "logits",
            **({} if gathered else BIASES),
        },
        "divisible": {"inner width of experts": INNER, "vocabulary": VOCAB},
        "experts": ["stack.*.mixture.experts"],
        "n_experts": EXPERTS,
    }


def build(gathered: bool = False, one_expert: bool = False) -> Net:
    torch.manual_seed(1)
    net = Net(gathered)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
        for layer in net.stack:
            if one_expert:  # and another one, for nobody can have the same two times
                layer.norm2.bias.fill_(1.0)
                layer.mixture.gate.matrix[:CHOSEN] = 3.0
    return net


def reference(gathered: bool = False, one_expert: bool = False) -> dict[str, Any]:
    """Train in one process with nothing but torch."""
    net = build(gathered, one_expert)
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
    return {"losses": losses, "norms": norms, "weights": {n: p.detach().clone() for n, p in net.named_parameters()}}


def train(
    degrees: Degrees,
    options: ParallelOptions | None = None,
    microbatches: int = 1,
    gathered: bool = False,
    one_expert: bool = False,
) -> dict[str, Any]:
    """Train the same steps laid out over the group."""
    torch._dynamo.reset()
    model = parallel_model(degrees, options, gathered, one_expert)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        mine, scored = share(model, step, microbatches)
        part = model.forward_backward(mine, summed_loss, scored)
        norms.append(float(model.clip_grad_norm(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return {"losses": losses, "norms": norms, "weights": full_state(model)}


def parallel_model(
    degrees: Degrees, options: ParallelOptions | None = None, gathered: bool = False, one_expert: bool = False
) -> ParallelModel:
    return parallelize(build(gathered, one_expert), cpu_mesh(degrees), plan(gathered), options)


def share(model: ParallelModel, step: int, microbatches: int = 1) -> tuple[list[Microbatch], int]:
    """Return this rank's part of a step's batch, and the number of scored tokens in all of it."""
    tokens, labels = batch(step)
    place = data_axis(model.mesh)
    mine = zip(
        *(x.chunk(place.dp_world_size)[place.dp_rank].chunk(microbatches) for x in (tokens, labels)), strict=True
    )
    return [Microbatch((t,), y) for t, y in mine], int((labels != -100).sum())


def idle_ranks(degrees: Degrees) -> tuple[list[list[int]], list[bool]]:
    """Return the counts that this rank's experts are called with in a step, and which gradients are there and zero."""
    model = parallel_model(degrees, None, False, one_expert=True)
    mine, scored = share(model, 0)
    model.forward_backward(mine, summed_loss, scored)
    experts = [layer.mixture.experts for layer in model.parts[0].stack]
    zero = [not p.grad.to_local().any() for module in experts for p in module._parameters.values()]
    return [counts for module in experts for counts in module.seen], zero


def exchange(dtype: torch.dtype, seed: int) -> tuple[float, list[int]]:
    """Exchange rows of random counts; return how far results and gradients are from those without an exchange.

    How far is in parts of the largest number of its tensor, since bfloat16 rounds in parts and sums here are grouped
    otherwise. Ranks with odd numbers have no rows at all, and nobody has any for the last rank's experts.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    n_experts = 3 * world_size
    counts = torch.randint(0, 4, (world_size, n_experts), generator=generator)
    counts[1::2], counts[:, -3:] = 0, 0
    weights = torch.randn(n_experts, DIM, generator=generator).to(dtype)
    inputs = [torch.randn(int(n), DIM, generator=generator).to(dtype) for n in counts.sum(1)]
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in inputs]
    here = slice(3 * rank, 3 * rank + 3)
    called: list[int] = []

    def experts(own: Tensor, x: Tensor, of: Tensor) -> Tensor:
        called.append(len(x))
        return x * own.repeat_interleave(of, 0).square()

    x, own = inputs[rank].clone().requires_grad_(), weights[here].clone().requires_grad_()
    out = with_exchange(partial(experts, own), x, counts[rank], dist.group.WORLD)
    out.backward(torch.zeros_like(out) + grads[rank])
    leaves, everything = [x.clone().requires_grad_() for x in inputs], weights.clone().requires_grad_()
    expected = [experts(everything, x, of) for x, of in zip(leaves, counts, strict=True)]
    torch.autograd.backward(expected, grads)
    pairs = [(out, expected[rank]), (x.grad, leaves[rank].grad), (own.grad, everything.grad[here])]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs if a.numel()), called[:1]


def layouts(degrees: Degrees) -> dict[str, tuple[str, list[str], list[int], bool]]:
    """Return of each parameter its mesh dims, placements, local shape, and whether its gradient is laid out alike."""
    model = parallel_model(degrees)
    mine, scored = share(model, 0)
    model.forward_backward(mine, summed_loss, scored)
    model.clip_grad_norm(None)
    return {
        name: (
            " ".join(p.device_mesh.mesh_dim_names),
            [str(placement) for placement in p.placements],
            list(p.to_local().shape),
            p.grad.placements == p.placements and p.grad.device_mesh == p.device_mesh,
        )
        for name, p in model.named_parameters()
    }


def norms_with_a_hole(degrees: Degrees) -> list[float]:
    """Return norms of random gradients, clipped and not, and with one that is not finite in one expert."""
    model = parallel_model(degrees)
    full = build()
    torch.manual_seed(7)
    for parameter, whole_parameter in zip(model.parameters(), full.parameters(), strict=True):
        gradient = torch.randn_like(whole_parameter)
        parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        whole_parameter.grad = gradient
    expected = float(nn.utils.clip_grad_norm_(full.parameters(), 0.5))
    found = float(model.clip_grad_norm(0.5))
    off = max(
        float((p.grad.full_tensor() - q.grad).abs().max())
        for p, q in zip(model.parameters(), full.parameters(), strict=True)
    )
    experts = dict(model.named_parameters())["stack.1.mixture.experts.narrow_bias"]
    if all(model.mesh[name].get_local_rank() == model.mesh[name].size() - 1 for name in ("dp_shard", "ep")):
        experts.grad.to_local().view(-1)[0] = float("nan")
    return [expected, found, off, float(model.clip_grad_norm(0.5))]


class Sent(TorchDispatchMode):
    """Notes how many rows leave this rank in each all-to-all, and how many others there are."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.rows: list[int] = []
        self.messages = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "_c10d_functional::all_to_all_single":
            x, _, splits, _ = args
            if x.is_floating_point():
                self.rows.append(sum(splits) - splits[self.rank])
            else:
                self.messages += 1
        return func(*args, **(kwargs or {}))


def traffic(checkpointing: str) -> tuple[list[int], list[int], int]:
    """Return how many rows left this rank in a step, how many had to by the choice of experts, and the messages."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    options = ParallelOptions(activation_checkpointing=checkpointing)
    model = parallel_model(Degrees(ep=2), options)
    mine, scored = share(model, 0)
    needed: list[int] = []

    def note(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        needed.append(int((output[1] // (EXPERTS // world_size) != rank).sum()))

    for layer in model.parts[0].stack:
        layer.mixture.gate.register_forward_hook(note)
    with Sent(rank) as sent:
        model.forward_backward(mine, summed_loss, scored)
    return sent.rows, needed, sent.messages


def refusal(degrees: Degrees, changed: ParallelPlan) -> str:
    """Return the message that `parallelize` refuses with."""
    merged: ParallelPlan = {**plan(), **changed}
    try:
        parallelize(build(), cpu_mesh(degrees), merged)
    except LayoutError as error:
        return str(error)
    return ""
