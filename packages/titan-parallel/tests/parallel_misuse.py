"""Cases in which something is wrong, or done at an odd time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel_cases import batch, build, plan, summed_loss, whole
from titan_parallel import (
    Degrees,
    LayoutError,
    Microbatch,
    ParallelModel,
    ParallelPlan,
    build_mesh,
    clip_grad_norm,
    parallelize,
)


def refusal(rank: int, world: int, degrees: Degrees, shared: bool, changed: ParallelPlan) -> str:
    """Return the message that `parallelize` refuses with, which must come on every rank without a hang."""
    merged: ParallelPlan = {**plan(False), **changed}
    try:
        parallelize(build(shared), build_mesh(degrees, "cpu"), merged)
    except LayoutError as error:
        return str(error)
    return ""


def wrong_calls(rank: int, world: int) -> list[str]:
    """Return what calls that cannot work are answered with."""
    model = _model(Degrees())
    state = model.state_dict()
    calls: list[Callable[[], object]] = [
        lambda: model.forward_backward([], summed_loss, 1.0),
        lambda: model.evaluate([], summed_loss),
        lambda: model.load_state_dict({name: value for name, value in state.items() if name != "table.weight"}),
        lambda: model.load_state_dict({**state, "last.bias": state["last.bias"][:1]}),
    ]
    return [_message(call) for call in calls]


def look_between(rank: int, world: int, degrees: Degrees, look: str) -> dict[str, Tensor]:
    """Train two steps, with or without a look at the model between backward and update; return the weights."""
    model = _model(degrees)
    tokens, labels = batch(0)
    step = [Microbatch((tokens,), labels)]
    if look == "predict":  # and before the optimizer takes hold of the parameters
        model.predict(tokens)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.forward_backward(step, summed_loss, labels.numel())
        if look == "evaluate":
            model.evaluate(step, summed_loss)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def modes_after_an_error(rank: int, world: int) -> tuple[bool, list[str]]:
    """Let the loss of an evaluation raise; return whether it did, and which modules are then in evaluation mode."""
    model = _model(Degrees())
    model.parts[0].stack[1].eval()  # frozen by its owner
    tokens, labels = batch(0)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    message = _message(lambda: model.evaluate([Microbatch((tokens,), labels)], broken))
    owned = [name for name, module in model.parts[0].named_modules() if name.count(".") < 2 and not module.training]
    return message == "RuntimeError: no loss today", owned


def add_twice(rank: int, world: int, degrees: Degrees) -> float:
    """Return how far gradients of two calls are from twice those of one."""
    once, twice = _model(degrees), _model(degrees)
    tokens, labels = batch(0)
    step = [Microbatch((tokens,), labels)]
    for model, calls in ((once, 1), (twice, 2)):
        for _ in range(calls):
            model.forward_backward(step, summed_loss, labels.numel())
    pairs = zip(once.parameters(), twice.parameters(), strict=True)
    return max(float((2 * _full(p.grad) - _full(q.grad)).abs().max()) for p, q in pairs)


def norm_of_bf16(rank: int, world: int, degrees: Degrees) -> tuple[float, float, bool]:
    """Return the norm of bf16 gradients as clipping gives it and as one gets it in fp64, and whether it was fp32."""
    model = parallelize(build(False).bfloat16(), build_mesh(degrees, "cpu"), plan(False))
    tokens, labels = batch(0)
    model.forward_backward([Microbatch((tokens,), labels)], summed_loss, labels.numel())
    exact = torch.stack([_full(p.grad).double().square().sum() for p in model.parameters()]).sum().sqrt()
    norm = clip_grad_norm(model.parameters(), None)
    return float(norm), float(exact), norm.dtype == torch.float32


def _model(degrees: Degrees) -> ParallelModel:
    return parallelize(build(False), build_mesh(degrees, "cpu"), plan(False))


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _full(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
