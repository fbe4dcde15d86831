"""Cases of wrong arguments and of calls at unusual times."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from parallel_cases import batch, build, full_state, plan, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import (
    Degrees,
    LayoutError,
    Microbatch,
    ParallelModel,
    ParallelOptions,
    ParallelPlan,
    build_mesh,
    clip_grad_norm,
    parallelize,
)


def refusal(degrees: Degrees, shared: bool, changed: ParallelPlan) -> str:
    """Return the message that `parallelize` refuses with, which must come on every rank without a hang."""
    merged: ParallelPlan = {**plan(False), **changed}
    try:
        parallelize(build(shared), build_mesh(degrees, "cpu"), merged)
    except LayoutError as error:
        return str(error)
    return ""


def wrong_calls() -> list[str]:
    """Return what calls that cannot work are answered with."""
    model = _model(Degrees())
    state = model.state_dict()
    calls: list[Callable[[], object]] = [
        lambda: model.forward_backward([], summed_loss, 1.0),
        lambda: model.evaluate([], summed_loss),
        lambda: model.evaluate([Microbatch(batch(0)[:1], None)], lambda output, _: output[0, 0]),
        lambda: model.load_state_dict({name: value for name, value in state.items() if name != "table.weight"}),
        lambda: model.load_state_dict({**state, "last.bias": state["last.bias"][:1]}),
    ]
    return [_message(call) for call in calls]


def disagreement(what: str) -> str:
    """Return the message when the last rank is asked for something else, which must come without a hang."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    odd = rank == world_size - 1
    degrees = Degrees(dp_replicate=2) if what == "degrees" and odd else Degrees()
    changed: ParallelPlan = {"after": ["last", "vocab_out"] if not odd else ["vocab_out", "last"]}
    options = ParallelOptions(compile_blocks=what == "options" and odd)
    net = build(False)
    if what == "weights" and odd:
        net.stack[1].mix.query.weight.data.normal_()
    net.last.requires_grad_(not (what == "frozen" and odd))
    tokens, labels = batch(0)
    count = 2 if what in ("forward_backward", "evaluate") and odd else 1
    step = [Microbatch((tokens,), labels)] * count

    def calls() -> None:
        mesh = build_mesh(degrees, "cpu")
        model = parallelize(net, mesh, {**plan(False), **(changed if what == "plan" else {})}, options)
        if what == "forward_backward":
            model.forward_backward(step, summed_loss, 1.0)
        if what == "num_target_tokens":
            model.forward_backward(step, summed_loss, 1.0 + rank)
        model.evaluate(step, summed_loss)

    return _message(calls)


def laid_out_before() -> list[str]:
    """Return what models are refused with that somebody has laid out, and meshes that somebody has made."""
    world_size = dist.get_world_size()
    mesh = cpu_mesh(Degrees())
    sharded = build(False)
    fully_shard(sharded.stack[1])
    models: list[nn.Module] = [sharded, _model(Degrees()).parts[0], nn.parallel.DistributedDataParallel(build(False))]
    plain = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    return [
        *(_message(lambda model=model: parallelize(model, mesh, plan(False))) for model in models),
        _message(lambda: parallelize(_model(Degrees()), mesh, plan(False))),  # type: ignore[arg-type]
        _message(lambda: parallelize(build(False), plain, plan(False))),
    ]


def states_of_other_layouts() -> list[str]:
    """Return the errors for states of other layouts, of which nothing may be copied."""
    model, other = _model(Degrees()), _model(Degrees(tp=2))
    before = full_state(model)
    said = [_message(lambda: model.load_state_dict(build(False).state_dict()))]
    said.append(_message(lambda: model.load_state_dict(other.state_dict())))
    assert all(torch.equal(weight, before[name]) for name, weight in full_state(model).items())
    return said


def dropped(seed: int, sequence_parallel: bool) -> str:
    """Return what a step with dropout says, on ranks that are seeded by `seed` times their number."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net = build(False)
    net.stack[1].mlp.append(nn.Dropout(0.5))
    options = ParallelOptions(sequence_parallel=sequence_parallel)
    model = parallelize(net, cpu_mesh(Degrees(tp=world_size)), plan(False), options)
    tokens, labels = batch(0)
    torch.manual_seed(rank * seed)
    return _message(lambda: model.forward_backward([Microbatch((tokens,), labels)], summed_loss, 1.0))


def unshardable(degrees: Degrees) -> str:
    """Return the message for parameters that FSDP2 does not take, or nothing if they are not sharded."""
    net = build(False)
    net.last.temperature = nn.Parameter(torch.ones(()))
    net.vocab_out.weight.data = net.vocab_out.weight.data.t().contiguous().t()
    words: ParallelPlan = {**plan(False), "tensor": {**plan(False)["tensor"], "last.temperature": "replicate"}}
    return _message(lambda: parallelize(net, cpu_mesh(degrees), words))


def look_between(degrees: Degrees, look: str) -> dict[str, Tensor]:
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
    return full_state(model)


def modes_after_an_error() -> tuple[bool, list[str]]:
    """Let the loss of an evaluation raise; return whether it did, and which modules are then in evaluation mode."""
    model = _model(Degrees())
    model.parts[0].stack[1].eval()  # frozen by its owner
    tokens, labels = batch(0)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    message = _message(lambda: model.evaluate([Microbatch((tokens,), labels)], broken))
    owned = [name for name, module in model.parts[0].named_modules() if name.count(".") < 2 and not module.training]
    return message == "RuntimeError: no loss today", owned


def add_twice(degrees: Degrees) -> float:
    """Return how far gradients of two calls are from twice those of one."""
    once, twice = _model(degrees), _model(degrees)
    tokens, labels = batch(0)
    step = [Microbatch((tokens,), labels)]
    for model, calls in ((once, 1), (twice, 2)):
        for _ in range(calls):
            model.forward_backward(step, summed_loss, labels.numel())
    pairs = zip(once.parameters(), twice.parameters(), strict=True)
    return max(float((2 * _full(p.grad) - _full(q.grad)).abs().max()) for p, q in pairs)


def norm_of_bf16(degrees: Degrees) -> tuple[float, float, bool]:
    """Return the norm of bf16 gradients as clipping gives it and as one gets it in fp64, and whether it was fp32."""
    model = parallelize(build(False).bfloat16(), cpu_mesh(degrees), plan(False))
    tokens, labels = batch(0)
    model.forward_backward([Microbatch((tokens,), labels)], summed_loss, labels.numel())
    exact = torch.stack([_full(p.grad).double().square().sum() for p in model.parameters()]).sum().sqrt()
    norm = clip_grad_norm(model.parameters(), None)
    return float(norm), float(exact), norm.dtype == torch.float32


def _model(degrees: Degrees) -> ParallelModel:
    return parallelize(build(False), cpu_mesh(degrees), plan(False))


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _full(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
