"""Cases of models as other people write them: unused parameters, buffers, norms over the batch, dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel_mesh import cpu_mesh
from parallel_steps import message
from titan_parallel import Degrees, Microbatch, ParallelModel, ParallelOptions, ParallelPlan, data_axis, parallelize

DIM, VOCAB = 16, 32
PLAN: ParallelPlan = {"blocks": ["blocks.*"], "before": ["embed"], "after": ["head"]}


class Experts(nn.Module):
    """Experts in a list, each called only if some token goes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.experts = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(4)])

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = self.norm(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                x = x + expert(y) * (chosen == i)[..., None]
        return x


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList([Experts() for _ in range(2)])
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, tokens % 4)
        return self.head(x)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def seeded(make: Any) -> Any:
    torch.manual_seed(5)
    return make()


def full(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def own(model: ParallelModel, *tensors: Tensor) -> tuple[Tensor, ...]:
    axis = data_axis(model.mesh)
    return tuple(x.chunk(axis.dp_world_size)[axis.dp_rank] for x in tensors)


def other_experts(used: tuple[tuple[int, ...], ...], degrees: Degrees, options: ParallelOptions, flag: bool) -> Any:
    """Return the largest error of any gradient, or the message, where ranks use the experts in `used`, step by step."""
    plain, model = seeded(Mixture), parallelize(seeded(Mixture), cpu_mesh(degrees), PLAN, options)
    if not flag:  # as before torch 2.15
        model.parts[0].set_reduce_scatter_unused_params(False)
    ranks = len(used)
    tokens = torch.cat([torch.tensor(some).repeat(8)[:8].expand(4, 8) for some in used])
    tokens = tokens + 4 * torch.randint(0, VOCAB // 4, tokens.shape, generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(1, 1)
    (cross_entropy(plain(tokens), labels) / labels.numel()).backward()
    x, y = tokens.chunk(ranks)[data_axis(model.mesh).dp_rank], labels.chunk(ranks)[data_axis(model.mesh).dp_rank]
    microbatches = [Microbatch((a,), b) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
    said = message(lambda: model.forward_backward(microbatches, cross_entropy, labels.numel()))
    if said != "no error":
        return said
    expected = {name: p.grad for name, p in plain.named_parameters()}
    found = {name: full(p.grad) for name, p in model.named_parameters()}
    pairs = [(_or_zero(found[name], p), _or_zero(expected[name], p)) for name, p in plain.named_parameters()]
    return max(float((a - b).abs().max()) for a, b in pairs)


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


class Towers(Mixture):
    """A tower that only some microbatches need."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(DIM, DIM)

    def forward(self, tokens: Tensor, picture: Tensor | None = None, last: bool = False) -> Tensor:
        x = self.embed(tokens)
        if picture is not None and not last:
            x = x + self.tower(picture)[:, None]
        for block in self.blocks:
            x = block(x, tokens % 4)
        x = self.head(x)
        return x + self.tower(picture).mean() if picture is not None and last else x


def missing_unit(last: bool, degrees: Degrees) -> str:
    plan: ParallelPlan = {**PLAN, "before": ["embed", "tower"]}
    model = parallelize(seeded(Towers), cpu_mesh(degrees), plan)
    tokens = torch.arange(16).view(2, 8)
    picture = torch.ones(2, DIM) if data_axis(model.mesh).dp_rank == 0 else None
    step = [Microbatch((tokens, picture, last), tokens)]
    return message(lambda: model.forward_backward(step, cross_entropy, tokens.numel()))


class Frequencies(nn.Module):
    """Buffers that no state dict contains."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(1.0, count + 1), persistent=False)
        self.register_buffer("index", torch.arange(count), persistent=False)


class Resetting(Frequencies):
    def reset_buffers(self, device: torch.device | str) -> None:
        self.table.copy_(torch.arange(1.0, 5))
        self.index.copy_(torch.arange(4))


class Buffered(nn.Module):
    def __init__(self, frequencies: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(2)])
        self.head = nn.Linear(DIM, VOCAB)
        self.rope = frequencies()
        self.register_buffer("kept", torch.full((3,), 2.0, device="cpu"), persistent=False)
        self.register_buffer("scale", torch.ones(2, device="cpu"))


def materialized(degrees: Degrees, kind: str, options: ParallelOptions) -> Any:
    """Return the buffers after `materialize`, or what it says."""
    with torch.device("meta"):
        net = Buffered(Resetting if kind == "reset" else Frequencies)
    model = parallelize(net, cpu_mesh(degrees), PLAN, options)
    given = {"rope.table": torch.arange(1.0, 5), "rope.index": torch.arange(4)}
    if kind == "wrong":
        given["rope.table"] = torch.ones(5)
    said = message(lambda: model.materialize("cpu", buffers=given if kind in ("given", "wrong") else None))
    if said != "no error":
        return said
    return {name: buffer.tolist() for name, buffer in model.parts[0].named_buffers()}


def llama(seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, use_cache=False, **shape)
    )


def llama_from_meta(degrees: Degrees, options: ParallelOptions) -> float:
    """Return how far the logits of a Llama built on meta and filled from a state dict are from the original's."""
    from titan_parallel import plan_from_transformers

    plain = llama()
    with torch.device("meta"):
        net = llama()
    model = parallelize(net, cpu_mesh(degrees), plan_from_transformers(net), options)
    model.materialize("cpu")
    state = plain.state_dict()
    model.load_state_dict(
        {
            name: distribute_tensor(state[name], value.device_mesh, value.placements)
            if isinstance(value, DTensor)
            else state[name]
            for name, value in model.state_dict().items()
        }
    )
    tokens = torch.arange(2 * 16).view(2, 16) % VOCAB
    with torch.no_grad():
        return float((model.predict(tokens).logits - plain.eval()(tokens).logits).abs().max())


class Stateful(nn.Module):
    """A block with one of the things that keep state of the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(DIM, DIM)
        if kind == "spectral":
            nn.utils.parametrizations.spectral_norm(self.linear)
        if "batch" in kind:
            self.norm = nn.BatchNorm1d(DIM)
            if kind == "batch-sync":
                self.norm = nn.SyncBatchNorm.convert_sync_batchnorm(self.norm)
        self.register_buffer("mean", torch.zeros(DIM), persistent=kind != "local")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("mean", "local", "shared") and self.training:
            mean = x.detach().mean((0, 1))
            if self.kind == "shared":
                dist.all_reduce(mean)
            self.mean.lerp_(mean, 0.1)
        y = self.linear(x - self.mean)
        return x + (self.norm(y.mT).mT if self.kind == "batch-frozen" else y)


class Stack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList([Stateful(kind) for _ in range(2)])
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch_state(kind: str, degrees: Degrees) -> str:
    """Return what two steps of a model that keeps state of the batch say."""
    net = seeded(lambda: Stack(kind))
    if kind == "batch-frozen":
        for block in net.blocks:
            block.norm.eval()

    def steps() -> None:
        model = parallelize(net, cpu_mesh(degrees), PLAN)
        tokens = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(2))
        (x,) = own(model, tokens)
        for _ in range(2):
            model.forward_backward([Microbatch((one,), one) for one in x.chunk(2)], cross_entropy, tokens.numel())

    return message(steps)


class Dropping(nn.Module):
    """Records the masks that it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.masks: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(16), 0.5, self.training)
        if self.training:
            self.masks.append((mask > 0).tolist())
        return x + self.linear(x) * float(mask.mean())  # a number also where x is a DTensor


class DroppingNet(Mixture):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Dropping() for _ in range(2)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def masks(degrees: Degrees, options: ParallelOptions, seed: int) -> tuple[list[Any], list[Any], float, bool]:
    """Train two steps twice from one random state; return this rank's masks, and whether the state was kept."""
    plan: ParallelPlan = {
        **PLAN,
        "tensor": {"embed": "vocab", "blocks.*": "replicate", "head": "logits"} if degrees.tp > 1 else {},
    }
    model = parallelize(seeded(DroppingNet), cpu_mesh(degrees), plan, options)
    tokens = torch.arange(32).view(4, 8)
    (x,) = own(model, tokens)
    microbatches = [Microbatch((one,), one) for one in x.chunk(2)]
    layers = [module for module in model.modules() if isinstance(module, Dropping)]
    found = []
    for _ in range(2):
        torch.manual_seed(seed * (1 + dist.get_rank()) if seed else 3)
        for _ in range(2):
            model.forward_backward(microbatches, cross_entropy, tokens.numel())
        found.append([mask for layer in layers for mask in layer.masks])
        for layer in layers:
            layer.masks.clear()
    after = float(torch.rand(()))
    before = torch.get_rng_state()
    model.evaluate(microbatches, cross_entropy)
    return found[0], found[1], after, torch.equal(before, torch.get_rng_state())


def seeds_differ(degrees: Degrees, options: ParallelOptions) -> str:
    return message(lambda: masks(degrees, options, 7))


def untouched_stream(degrees: Degrees) -> bool:
    """Return whether a step without dropout leaves torch's generator as it was."""
    model = parallelize(seeded(Mixture), cpu_mesh(degrees), PLAN)
    (x,) = own(model, torch.arange(32).view(4, 8))
    before = torch.get_rng_state()
    model.forward_backward([Microbatch((x,), x)], cross_entropy, 32)
    return torch.equal(before, torch.get_rng_state())


def looks(degrees: Degrees, look: str, options: ParallelOptions) -> list[Tensor]:
    """Train three steps with a look at the model between backward and update; return weights and norms."""
    model = parallelize(seeded(Mixture), cpu_mesh(degrees), PLAN, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.arange(32).view(4, 8)
    (x,) = own(model, tokens)
    norms = []
    for _ in range(3):
        model.forward_backward([Microbatch((x,), x)], cross_entropy, tokens.numel())
        if look == "part":
            model.parts[0](x)
        if look == "call":
            model(x)
            assert all(module.training for module in model.modules())
        if look == "modes":
            model.eval()(x)
            assert not any(module.training for module in model.modules())
            model.train()
        norms.append(model.clip_grad_norm(0.5))
        optimizer.step()
        model.zero_grad()
    return [*norms, *(full(p).detach().clone() for p in model.parameters())]  # type: ignore[union-attr]
