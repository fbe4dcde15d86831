"""What titan-parallel costs: its overhead over plain torch, and what its layouts send, against theory.

Whole training steps of titan-model's decoder: forward, loss, backward, clipping, AdamW. Two ways of the same step take
turns, round by round, so that whatever else slows the machine slows both; the figure is the median of the rounds'
ratios. Bytes are those of the whole tensor that a collective gathers, scatters or sums, on one rank.

    uv run python tools/bench_parallel.py             # the tables of docs/performance.md
    uv run python tools/bench_parallel.py --tiny      # does it run?
    uv run python tools/bench_parallel.py --rounds 9 --only one
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

import titan_model
from titan_model import DecoderConfig
from titan_parallel import Degrees, Microbatch, ParallelModel, ParallelOptions, build_mesh, parallelize

SHAPE = DecoderConfig(
    vocab_size=16_384, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, ffn_dim=2048, max_seq_len=1024
)  # 110.1 million parameters
TINY = replace(SHAPE, vocab_size=256, dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=128, max_seq_len=64)
MAX_NORM = 1.0
Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What to measure, in a form that goes to other processes."""

    tiny: bool
    rounds: int
    steps: int

    @property
    def shape(self) -> DecoderConfig:
        """Of the model."""
        return TINY if self.tiny else SHAPE


def main() -> None:
    """Run the benchmarks and print their tables as Markdown."""
    options = _arguments()
    settings = Settings(options.tiny, options.rounds, options.steps)
    print(_machine(), "\n")
    if options.only in (None, "one", "two"):
        print("| step of | seconds | of plain torch | ratio (median; all) |")
        print("|---|---|---|---|")
        if options.only != "two":
            print(_ratio_line("one process", _spawn(1, _one_process, settings)), flush=True)
        if options.only != "one":
            print(_ratio_line("FSDP2, 2 processes", _spawn(2, _two_processes, settings)), flush=True)
        print()
    if options.only in (None, "traffic"):
        print("| layout | collective | bytes of a step | theory | ratio |")
        print("|---|---|---|---|---|")
        for layout in LAYOUTS:
            print(_traffic_lines(layout, settings), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps per round and way")
    parser.add_argument("--tiny", action="store_true", help="a model of two small blocks")
    parser.add_argument("--only", choices=["one", "two", "traffic"])
    return parser.parse_args()


def _ratio_line(name: str, rounds: Sequence[tuple[float, float]]) -> str:
    ratios = sorted(ours / plain for ours, plain in rounds)
    ours, plain = (statistics.median(column) for column in zip(*rounds, strict=True))
    spread = " ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"| {name} | {ours:.3f} | {plain:.3f} | **{statistics.median(ratios):.3f}** ({spread}) |"


def _one_process(settings: Settings) -> list[tuple[float, float]]:
    return _alternate(_titan_step(settings), _plain_step(_build(settings.shape), settings), settings)


def _two_processes(settings: Settings) -> list[tuple[float, float]]:
    return _alternate(_titan_step(settings), _plain_step(_sharded_by_hand(settings.shape), settings), settings)


def _titan_step(settings: Settings) -> Step:
    model = _laid_out(settings.shape, Degrees())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    microbatch, count = _microbatch(settings.shape)

    def step() -> None:
        model.forward_backward([microbatch], _total, count * dist.get_world_size())
        model.clip_grad_norm(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _plain_step(model: nn.Module, settings: Settings) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    microbatch, count = _microbatch(settings.shape)

    def step() -> None:
        loss = _total(model(*microbatch.args, **microbatch.kwargs), None) / (count * dist.get_world_size())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if isinstance(norm, DTensor):
            norm.full_tensor()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sharded_by_hand(shape: DecoderConfig) -> nn.Module:
    """Shard a decoder as one would without titan-parallel, in the same units."""
    model = _build(shape)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.embed, mesh=mesh)
    assert isinstance(model.embed, FSDPModule)
    model.embed.set_unshard_in_backward(False)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard([model.norm, model.head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _alternate(ours: Step, plain: Step, settings: Settings) -> list[tuple[float, float]]:
    """Return the seconds of a step of both, round by round; the one that begins alternates too."""
    for step in (ours, plain, ours, plain):  # allocates, warms up
        step()
    rounds = []
    for i in range(settings.rounds):
        seconds = {one: _seconds(one, settings.steps) for one in ((ours, plain), (plain, ours))[i % 2]}
        rounds.append((seconds[ours], seconds[plain]))
    return rounds


def _seconds(step: Step, steps: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - started) / steps


@dataclass(frozen=True)
class Layout:
    """One layout whose traffic is counted."""

    name: str
    degrees: Degrees
    world: int
    theory: Callable[[DecoderConfig, int], dict[str, float]]


def _fsdp_theory(shape: DecoderConfig, copies: int) -> dict[str, float]:
    """Return bytes by collective: weights gathered forward and, in blocks, backward; their gradients scattered once."""
    whole = 4 * titan_model.count_parameters(shape)
    blocks = whole - 4 * (2 * shape.vocab_size * shape.dim + shape.dim)
    bytes_ = {"all_gather": float(whole + blocks), "reduce_scatter": float(whole)}
    return bytes_ if copies == 1 else bytes_ | {"all_reduce": whole / copies}


def _tensor_theory(shape: DecoderConfig, _: int) -> dict[str, float]:
    """Return bytes by collective of a step over B x S tokens, whose activations are B x S x D.

    Attention and feed-forward each gather and scatter them once forward and once backward, the embedding scatters and
    gathers, the head gathers and scatters. Summed over ranks are the gradients of norms, and for the loss over a split
    vocabulary the maximum, the sum of exponentials and the label's logit of each token.
    """
    tokens = shape.max_seq_len
    activations = 4 * tokens * shape.dim
    norms = 4 * (2 * shape.n_layers + 1) * shape.dim
    moved = float(activations * (4 * shape.n_layers + 2))
    return {"all_gather": moved, "reduce_scatter": moved, "all_reduce": float(norms + 3 * 4 * tokens)}


LAYOUTS = [
    Layout("FSDP 2", Degrees(), 2, lambda shape, _: _fsdp_theory(shape, 1)),
    Layout("HSDP 2 x 2", Degrees(dp_replicate=2), 4, lambda shape, _: _fsdp_theory(shape, 2)),
    Layout("TP 2 with sequence parallelism", Degrees(tp=2), 2, _tensor_theory),
]


def _traffic_lines(layout: Layout, settings: Settings) -> str:
    counted: dict[str, float] = _spawn(layout.world, _traffic, settings, layout.degrees)
    expected = layout.theory(settings.shape, layout.world)
    return "\n".join(
        f"| {layout.name} | {kind} | {counted.get(kind, 0):,.0f} | {expected.get(kind, 0):,.0f} | "
        f"**{counted.get(kind, 0) / expected[kind] if kind in expected else float('inf'):.4f}** |"
        for kind in sorted(counted.keys() | expected.keys())
    )


def _traffic(settings: Settings, degrees: Degrees) -> dict[str, int]:
    model = _laid_out(settings.shape, degrees)
    microbatch, count = _microbatch(settings.shape)
    with Traffic() as traffic:
        model.forward_backward([microbatch], _total, count)
    return dict(traffic.bytes)


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of what passes through collectives, by kind: the whole tensor that each is about."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come through here one by one
        match str(func.overloadpacket):
            case "c10d._allgather_base_":
                self.bytes["all_gather"] += _bytes(args[0])
            case "c10d._reduce_scatter_base_":
                self.bytes["reduce_scatter"] += _bytes(args[1])
            case "c10d.allreduce_":
                self.bytes["all_reduce"] += sum(map(_bytes, args[0]))
            case "_c10d_functional.all_gather_into_tensor":
                self.bytes["all_gather"] += _bytes(args[0]) * args[1]
            case "_c10d_functional.reduce_scatter_tensor":
                self.bytes["reduce_scatter"] += _bytes(args[0])
            case "_c10d_functional.all_reduce":
                self.bytes["all_reduce"] += _bytes(args[0])
        return func(*args, **(kwargs or {}))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _build(shape: DecoderConfig) -> titan_model.Decoder:
    model = titan_model.build(shape, device="cpu")
    titan_model.init_parameters(model.named_parameters(), shape, seed=0)
    return model


def _laid_out(shape: DecoderConfig, degrees: Degrees) -> ParallelModel:
    mesh = build_mesh(degrees, "cpu")
    return parallelize(_build(shape), mesh, titan_model.parallel_plan(shape), ParallelOptions())


def _microbatch(shape: DecoderConfig) -> tuple[Microbatch, int]:
    tokens = torch.randint(0, shape.vocab_size, (1, shape.max_seq_len + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].contiguous()
    return Microbatch((tokens[:, :-1].contiguous(),), None, {"labels": labels}), labels.numel()


def _total(output: titan_model.LossSums, _: None) -> Tensor:
    return output.total


def _spawn(world: int, measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `measure` returns on rank 0 of a group of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_serve, (world, folder, measure, arguments), nprocs=world)  # type: ignore[no-untyped-call]
        return json.loads(Path(folder, "result").read_text())


def _serve(rank: int, world: int, folder: str, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = measure(*arguments)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, {versions}"


if __name__ == "__main__":
    main()
