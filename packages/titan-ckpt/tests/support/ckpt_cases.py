"""What the ranks of a Ranks do: each function is called on all of them."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckpt_states import Held, ModelState, OptimizerState, blank_state, holds_step, make_model, make_state
from titan_ckpt import Checkpointer, CheckpointError
from titan_ckpt.load import loading
from titan_ckpt.save import saving, snapshot
from titan_ckpt.storage import local
from titan_ckpt.storage.direct_io import DirectFile


def lay_out(model: nn.Module, layout: str) -> nn.Module:
    """Shard over all ranks: "plain", "fsdp", "hsdp" or "fsdp x tp"."""
    world = dist.get_world_size()
    if layout == "plain":
        return model
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        both = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("shard", "tp"))
        parallelize_module(model, both["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": ColwiseParallel()})
        mesh = both["shard"]
    for layer in model:  # type: ignore[attr-defined]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Move every weight, by gradients that are made up: layers whose widths TP does not divide have no forward."""
    for step in range(steps):
        for weight in model.parameters():
            weight.grad = weight.detach() * 0.1 + step
        optimizer.step()


def full(state: dict[str, Any]) -> dict[str, Any]:
    """The same on any layout: full tensors, and JSON as it is."""
    flat = {f"{name}/{key}": value for name, part in state.items() for key, value in part.state_dict().items()}
    flat = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in flat.items()}
    return {key: value.detach().clone() if isinstance(value, torch.Tensor) else value for key, value in flat.items()}


def trained_state(layout: str, seed: int) -> dict[str, Any]:
    model = lay_out(make_model(seed), layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    train(model, optimizer)
    return {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}


def save_laid_out(folder: Path, layout: str, asynchronous: bool) -> dict[str, Any]:
    """Save, then change every weight at once while the writer is held back; return what must have been saved."""
    state = trained_state(layout, seed=1)
    expected = full(state)
    write = saving.write_file

    def slow(*args: Any) -> Any:
        time.sleep(0.3 if asynchronous else 0)
        return write(*args)

    ckpt = Checkpointer(folder, asynchronous=asynchronous)
    with mock.patch.object(saving, "write_file", slow):
        ckpt.save(3, state, {"layout": layout})
        if asynchronous:
            train(
                state["model"].model, state["optimizer"].optimizer
            )  # its collectives run at the same time as the save's
            for _ in range(20):
                dist.all_reduce(torch.ones(10))
        ckpt.close()
    return expected if dist.get_rank() == 0 else {}


def load_laid_out(folder: Path, layout: str) -> dict[str, Any]:
    state = trained_state(layout, seed=2)
    ckpt = Checkpointer(folder)
    found = ckpt.load(state)
    ckpt.close()
    assert found is not None
    loaded = full(state)
    train(state["model"].model, state["optimizer"].optimizer, steps=1)  # what was loaded can be trained
    return loaded if dist.get_rank() == 0 else {}


def load_one_tensor(folder: Path, length: int, layout: str, machines: int = 1) -> int:
    """Load the tensor `a`, sharded or replicated; return how many bytes bypassed the page cache.

    The ranks take themselves to be spread over `machines`.
    """
    tensor = torch.zeros(length)
    if layout == "sharded":
        tensor = distribute_tensor(tensor, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    read, done = DirectFile.read, []

    def counted(self: DirectFile, view: memoryview, at: int) -> int:
        done.append(read(self, view, at))
        return done[-1]

    where = f"machine {dist.get_rank() % machines}"
    with mock.patch.object(DirectFile, "read", counted), mock.patch.object(loading, "machine_id", return_value=where):
        assert Checkpointer(folder).load({"model": Held(a=tensor)}) is not None
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    assert torch.equal(whole, torch.arange(length).remainder_(251).float())
    return sum(done)


def save_fsdp_over_tp(folder: Path) -> dict[str, torch.Tensor]:
    """FSDP2 itself over TP, of 9 rows on 4 x 2 ranks; return the whole weights, from before they were sharded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9))
    whole = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    both = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("shard", "tp"))
    parallelize_module(model, both["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=both["shard"])
    ckpt = Checkpointer(folder)
    ckpt.save(1, {"model": Held(**dict(model.named_parameters()))})
    ckpt.close()
    return whole


def own_weights_per_rank(folder: Path) -> list[str]:
    """As pipeline stages: each rank has tensors of its own, and loads those of another rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    other = (rank + 1) % world
    ckpt = Checkpointer(folder)
    ckpt.save(1, {"model": Held(**{f"layer{rank}": {"w": torch.full((3,), rank)}}), "data": Held(position=1)})
    state = {"model": Held(**{f"layer{other}": {"w": torch.zeros(3, dtype=torch.int64)}})}
    ckpt.load(state)
    assert state["model"].state[f"layer{other}"]["w"].tolist() == [other] * 3
    message = message_of(lambda: ckpt.load({"model": Held(layer0={"w": torch.zeros(3, dtype=torch.int64)})}))
    ckpt.close()
    return [message]


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""


def raise_on(rank: int, error: BaseException) -> Callable[..., Any]:
    def replaced(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == rank:
                raise error
            return original(*args, **kwargs)

        return call

    return replaced


# Where a save can fail: what is replaced by something that raises. "sync" is the first file, whichever that is.
FAILURES: dict[str, tuple[Any, str]] = {
    "collect": (snapshot, "split"),
    "assign_writes": (snapshot, "assign_writes"),
    "begin": (local.LocalStorage, "begin"),
    "create": (local.LocalStorage, "create"),
    "write": (local._Sink, "write"),
    "sync": (os, "fsync"),
    "publish": (local.LocalStorage, "publish"),
    "rename": (os, "rename"),
}


def one_rank_fails(folder: Path, where: str, rank: int, asynchronous: bool) -> list[str]:
    """A save, one that fails on `rank` in `where`, and one after it."""
    ckpt = Checkpointer(folder, asynchronous=asynchronous)
    ckpt.save(1, make_state(1))
    ckpt.wait()
    target, name = FAILURES[where]
    patched = raise_on(rank, OSError(28, f"No space in {where}"))(getattr(target, name))
    state = make_state(2) | {"more": Held(x=torch.ones(1))}  # another structure, so that it is planned again
    with mock.patch.object(target, name, patched):
        message = message_of(lambda: (ckpt.save(2, state), ckpt.wait()))
    dist.barrier()
    names = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    state = blank_state()
    found = ckpt.load(state)
    assert found is not None
    assert found.step == 1
    assert holds_step(state, 1)
    ckpt.save(3, make_state(3))
    ckpt.wait()
    ckpt.load(state, step=3)
    assert holds_step(state, 3)
    ckpt.close()
    return [message, *names]


def states_that_differ(folder: Path) -> dict[str, str]:
    """Return the messages on this rank for states that differ on rank 1."""
    rank = dist.get_rank()
    good, mesh = Held(x=1), init_device_mesh("cpu", (dist.get_world_size(),))
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    shard = DTensor.from_local(torch.ones(4), mesh, [Shard(0)])
    good_too, shape = torch.ones(1), 3 if rank == 1 else 2
    states: dict[str, Any] = {
        "json": {"a": good, "data": Held(position=rank)},
        "float": {"a": good, "data": Held(position=1 if rank else 1.0)},
        "names": {"a": good, f"b{rank}": good},
        "leaf": {"a": Held(x=object() if rank == 1 else 1)},
        "partial": {"a": Held(x=partial)},
        "shape": {"a": Held(x=torch.ones(shape))},
        "hole": {"a": Held(x=shard, y=good_too) if rank == 0 else Held(y=good_too)},
        "tensor": {"a": Held(rng=torch.tensor([7, rank]), same=torch.ones(3))},
        "twice": {"a": Held(x=shard if rank == 0 else torch.ones(8))},
    }
    ckpt = Checkpointer(folder, asynchronous=True)
    messages = {name: message_of(lambda s=state: (ckpt.save(1, s), ckpt.wait())) for name, state in states.items()}
    messages["step"] = message_of(lambda: ckpt.save(rank, {"a": good}))
    assert [path.name for path in folder.iterdir()] == [".lock"]
    ckpt.save(1, {"a": good})
    ckpt.close()
    return messages


def load_what_may_be_corrupt(folder: Path) -> int | None:
    state = blank_state()
    ckpt = Checkpointer(folder)
    found = ckpt.load(state)
    ckpt.close()
    assert found is None or holds_step(state, found.step)
    return found and found.step


def loading_fails_on_one_rank(folder: Path) -> str:
    class Fails(Held):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            if dist.get_rank() == 1:
                raise KeyError("no such thing")

    ckpt = Checkpointer(folder)
    ckpt.save(1, {"data": Held(x=1)})
    message = message_of(lambda: ckpt.load({"data": Fails()}))
    ckpt.close()
    return message


def mismatch_on_one_rank(folder: Path) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ckpt = Checkpointer(folder)
    ckpt.save(1, {"model": Held(w=distribute_tensor(torch.arange(10.0), mesh, [Shard(0)]))})
    size = 10 if dist.get_rank() == 0 else 11
    message = message_of(lambda: ckpt.load({"model": Held(w=torch.zeros(size))}))
    ckpt.close()
    return message


def half_of_the_ranks(folder: Path) -> list[int]:
    """Ranks 2 and 3 save by themselves, in a group of their own."""
    group = dist.new_group([2, 3], backend="gloo")
    if dist.get_rank() < 2:
        return []
    ckpt = Checkpointer(folder, process_group=group, asynchronous=True)
    ckpt.save(1, {"model": Held(**{f"w{dist.get_rank()}": torch.ones(1)})})
    ckpt.wait()
    state = {"model": Held(w2=torch.zeros(1), w3=torch.zeros(1))}
    ckpt.load(state)
    ckpt.close()
    return [int(tensor) for tensor in state["model"].state.values()]


def many_checkpointers(folder: Path) -> int:
    """Created, used and closed one after the other: no rank hangs, and no socket stays open."""
    before = len(os.listdir("/proc/self/fd"))
    for step in range(8):
        ckpt = Checkpointer(folder, keep_last=2, asynchronous=step % 2 == 0)
        ckpt.load({})
        ckpt.save(step, make_state(step))
        ckpt.close()
    return len(os.listdir("/proc/self/fd")) - before


def one_rank_dies(folder: Path, tale: Path) -> None:
    ckpt = Checkpointer(folder, asynchronous=True)
    ckpt.save(1, make_state(1))
    ckpt.wait()

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(saving, "write_file", die if dist.get_rank() == 1 else saving.write_file):
        tale.write_text(message_of(lambda: (ckpt.save(2, make_state(2)), ckpt.wait())))


def out_of_step(folder: Path) -> list[str]:
    """Rank 1 makes another call than rank 0, as after an exception that only one of them caught; then both go on."""
    ckpt = Checkpointer(folder)
    ckpt.save(1, make_state(1))
    calls = [lambda: ckpt.save(2, make_state(2)), lambda: ckpt.load(blank_state())]
    messages = [message_of(calls[dist.get_rank()]), *map(message_of, calls)]
    ckpt.close()
    dist.barrier()
    with Checkpointer(folder) as ckpt:
        state = blank_state()
        found = ckpt.load(state)
        assert found is not None
        assert holds_step(state, found.step)
        ckpt.save(5, make_state(5))
    return messages


def interrupted_between_exchanges(folder: Path) -> list[str]:
    """Ctrl-C reaches rank 1 alone, where it has nothing that the others could be told."""
    ckpt = Checkpointer(folder)
    ckpt.save(1, make_state(1))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    messages = []
    patch = mock.patch.object(
        ckpt._saver._planner, "_plan" if dist.get_rank() == 1 else "unused", interrupt, create=True
    )
    with patch:
        try:
            messages.append(message_of(lambda: ckpt.save(2, {"a": Held(x=1, y=torch.ones(1))})))
        except KeyboardInterrupt:
            messages.append("KeyboardInterrupt")
    messages.append(message_of(lambda: ckpt.save(3, make_state(3))))
    ckpt.close()
    return messages


def interrupted_while_working(folder: Path) -> list[str]:
    """Ctrl-C reaches rank 1 alone while it writes: the others are told, and all can go on."""
    ckpt = Checkpointer(folder)
    ckpt.save(1, make_state(1))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    messages = []
    write = interrupt if dist.get_rank() == 1 else saving.write_file
    with mock.patch.object(saving, "write_file", write):
        try:
            messages.append(message_of(lambda: ckpt.save(2, make_state(2))))
        except KeyboardInterrupt:
            messages.append("KeyboardInterrupt")
    ckpt.save(3, make_state(3))
    ckpt.close()
    return messages
