"""Cases of calls that ranks make together: under autocast, with different arguments, with errors of a loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_cases import batch, build, plan, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import Degrees, Microbatch, ParallelModel, ParallelOptions, data_axis, parallelize

MICROBATCHES = 2
SCORED = int((batch(0)[1] != -100).sum())


def model_of(degrees: Degrees, options: ParallelOptions | None = None, net: nn.Module | None = None) -> ParallelModel:
    return parallelize(net or build(False), cpu_mesh(degrees), plan(False), options)


def microbatches(model: ParallelModel, step: int = 0, count: int = MICROBATCHES) -> list[Microbatch]:
    axis = data_axis(model.mesh)
    tokens, labels = (x.chunk(axis.dp_world_size)[axis.dp_rank].chunk(count) for x in batch(step))
    return [Microbatch((x,), y) for x, y in zip(tokens, labels, strict=True)]


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Casting(nn.Module):
    """A module that casts by itself, as some models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with bf16():
            return self.inner(x)


def autocast_plain(chunks: int) -> list[tuple[float, float]]:
    """Train in one process, each chunk of rows under an autocast of its own."""
    net = build(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2, eps=1e-5)
    found = []
    for step in range(3):
        total = 0.0
        for tokens, labels in zip(*(x.chunk(chunks) for x in batch(step)), strict=True):
            with bf16():
                loss = summed_loss(net(tokens), labels) / SCORED
            loss.backward()
            total += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(net.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        found.append((total, norm))
    return found


def autocast_around(degrees: Degrees, options: ParallelOptions, inside: bool) -> list[tuple[float, float]]:
    """Train under one autocast around everything, with evaluations in between."""
    net = build(False)
    if inside:
        net.stack[1].mlp = Casting(net.stack[1].mlp)
    model = model_of(degrees, options, net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-5)
    found = []
    with bf16():
        for step in range(3):
            model.evaluate(microbatches(model, step), summed_loss)
            loss = model.sum_parts(model.forward_backward(microbatches(model, step), summed_loss, SCORED))
            found.append((float(loss), float(model.clip_grad_norm(1.0))))
            optimizer.step()
            optimizer.zero_grad()
    return found


def disagreement_later(degrees: Degrees, what: str) -> tuple[str, bool]:
    """Let the last rank differ in the second call; return its message, and whether the model is as good as before."""
    model, fresh = model_of(degrees), model_of(degrees)
    mine = microbatches(model)
    odd = dist.get_rank() == dist.get_world_size() - 1
    model.forward_backward(mine, summed_loss, SCORED)
    model.evaluate(mine, summed_loss)
    for parameter in model.parameters():
        parameter.grad = None

    def differ() -> Any:
        if what == "call" and odd:
            return model.evaluate(mine, summed_loss)
        if what == "evaluate":
            return model.evaluate(mine[: 1 if odd else 2], summed_loss)
        count = 1 if what == "fewer" and odd else 2
        return model.forward_backward(mine[:count], summed_loss, SCORED + (what == "tokens" and odd))

    return message(differ), _equal_step(model, fresh)


def other_data(degrees: Degrees, call: str) -> str:
    """Return the message where each rank reads data of its own."""
    model = model_of(degrees)
    tokens, labels = (x.roll(dist.get_rank(), 0) for x in batch(0))
    halves = [Microbatch((x,), y) for x, y in zip(tokens.chunk(2), labels.chunk(2), strict=True)]
    if call == "predict":
        return message(lambda: model.predict(tokens))
    return message(lambda: getattr(model, call)(halves, summed_loss, *([SCORED] if call == "forward_backward" else [])))


class Failing:
    """A loss that fails once, on some ranks."""

    def __init__(self, fails: bool, at: int) -> None:
        self.left = at if fails else -1

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        if self.left == -1:
            raise ValueError("no loss today")
        return summed_loss(output, target)


def failing_loss(degrees: Degrees, call: str, at: int, first: bool) -> tuple[str, bool]:
    """Let the loss of the last rank fail, under tp of all; return the message, and whether the model is as before."""
    model, fresh = model_of(degrees), model_of(degrees)
    mine = microbatches(model)
    if not first:
        model.evaluate(mine, summed_loss)
        model.forward_backward(mine, summed_loss, SCORED)
    loss = Failing(degrees.tp > 1 or dist.get_rank() == dist.get_world_size() - 1, at)
    tokens = [SCORED] if call == "forward_backward" else []
    said = message(lambda: getattr(model, call)(mine, loss, *tokens))
    if call == "evaluate":
        for parameter in model.parameters():
            parameter.grad = None
    assert all(parameter.grad is None for parameter in model.parameters())
    return said, _equal_step(model, fresh)


def failing_model() -> tuple[str, str]:
    """Let the forward fail on all ranks; return what this call says, and what the next one says."""
    model = model_of(Degrees())
    wrong = [Microbatch((torch.full((2, 4), 10**6),), None)]
    return tuple(message(lambda: model.evaluate(wrong, summed_loss)) for _ in range(2))  # type: ignore[return-value]


def frozen(degrees: Degrees, names: list[str]) -> tuple[float, float, list[str]]:
    """Return loss, norm and the parameters with gradients where all but `names` is frozen."""
    net = build(False)
    net.requires_grad_(False)
    for name in names:
        net.get_submodule(name).requires_grad_(True)
    model = model_of(degrees, None, net)
    loss = model.sum_parts(model.forward_backward(microbatches(model), summed_loss, SCORED))
    norm = model.clip_grad_norm(1.0)
    return float(loss), float(norm), [name for name, p in model.named_parameters() if p.grad is not None]


def frozen_plain(names: list[str]) -> tuple[float, float]:
    net = build(False)
    net.requires_grad_(False)
    for name in names:
        net.get_submodule(name).requires_grad_(True)
    tokens, labels = batch(0)
    loss = summed_loss(net(tokens), labels) / SCORED
    if names:
        loss.backward()
    return float(loss.detach()), float(nn.utils.clip_grad_norm_(net.parameters(), 1.0)) if names else 0.0


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _equal_step(model: ParallelModel, fresh: ParallelModel) -> bool:
    """Return whether a step of both gives the same loss and gradients."""
    losses = [one.forward_backward(microbatches(one), summed_loss, SCORED) for one in (model, fresh)]
    pairs = zip(model.parameters(), fresh.parameters(), strict=True)
    return torch.equal(*losses) and all(torch.equal(_full(p.grad), _full(q.grad)) for p, q in pairs)


def _full(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def failing_forward(degrees: Degrees, path: str, first: bool) -> None:
    """Let the forward of the last rank fail, write what the others say to a file, and end the processes."""
    model = model_of(degrees)
    if not first:
        model.forward_backward(microbatches(model), summed_loss, SCORED)
    mine = microbatches(model)
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        model.parts[-1].stack[2].register_forward_pre_hook(_fail)
    said = message(lambda: model.forward_backward(mine, summed_loss, SCORED))
    with open(f"{path}/{dist.get_rank()}", "w") as file:
        file.write(said)
    if last:
        os._exit(1)


def _fail(*_: object) -> None:
    raise ValueError("no forward today")


def constant_loss(degrees: Degrees) -> float:
    """Return the error of the gradients where the last data rank scores no token, and so has a loss without graph."""
    model, net = model_of(degrees), build(False)
    tokens, labels = batch(0)
    half = len(tokens) // 2

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return summed_loss(output, target) if (target >= 0).any() else torch.zeros(())

    labels[half:] = -100
    (summed_loss(net(tokens), labels) / SCORED).backward()
    axis = data_axis(model.mesh)
    x, y = (one.chunk(axis.dp_world_size)[axis.dp_rank] for one in (tokens, labels))
    model.forward_backward([Microbatch((a,), b) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)], loss, SCORED)
    pairs = zip(model.parameters(), net.parameters(), strict=True)
    return max(float((_full(p.grad) - _full(q.grad)).abs().max()) for p, q in pairs)
