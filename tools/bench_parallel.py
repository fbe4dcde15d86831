"""What titan-parallel costs: its overhead over torch alone, what its layouts send, and how long pipelines wait.

Whole training steps of titan-model's decoder: forward, loss, backward, clipping, AdamW. Two ways of the same step take
turns, round by round, so that whatever else slows the machine slows both; the figure is the median of the rounds'
ratios.

    uv run python tools/bench_parallel.py             # the tables of docs/performance.md
    uv run python tools/bench_parallel.py --tiny      # does it run?
    uv run python tools/bench_parallel.py --rounds 9 --only one
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bench_parallel_bubbles import CASES, bubble_line
from bench_parallel_traffic import LAYOUTS, traffic_lines
from bench_parallel_work import Settings, build, in_group, laid_out, machine, one_row, total_loss
from titan_model import DecoderConfig
from titan_parallel import Degrees

MAX_NORM = 1.0
Step = Callable[[], None]


def main() -> None:
    """Run the benchmarks and print their tables as Markdown."""
    options = _arguments()
    settings = Settings(options.tiny, options.rounds, options.steps)
    print(machine(), "\n")
    for what in TABLES if options.only is None else [options.only]:
        head, lines = TABLES[what]
        print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}")
        for line in lines(settings):
            print(line, flush=True)
        print()


def _one_line(settings: Settings) -> Iterator[str]:
    yield _ratio_line("one process", in_group(1, _one_process, settings))


def _two_line(settings: Settings) -> Iterator[str]:
    yield _ratio_line("FSDP2, 2 processes", in_group(2, _two_processes, settings))


def _traffic_lines(settings: Settings) -> Iterator[str]:
    return (traffic_lines(layout, settings) for layout in LAYOUTS)


def _bubble_lines(settings: Settings) -> Iterator[str]:
    return (bubble_line(case, settings) for case in CASES)


_RATIO = "step of | seconds | torch alone | ratio (median; all)"
TABLES: dict[str, tuple[str, Callable[[Settings], Iterator[str]]]] = {
    "one": (_RATIO, _one_line),
    "two": (_RATIO, _two_line),
    "traffic": ("layout | kind | bytes of a step | theory | ratio", _traffic_lines),
    "bubbles": (
        "schedule | ranks x stages | microbatches | waiting, theory | measured (median; all) | time / theory",
        _bubble_lines,
    ),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps per round and way")
    parser.add_argument("--tiny", action="store_true", help="a model of two small blocks")
    parser.add_argument("--only", choices=list(TABLES))
    return parser.parse_args()


def _ratio_line(name: str, rounds: Sequence[tuple[float, float]]) -> str:
    ratios = sorted(ours / plain for ours, plain in rounds)
    ours, plain = (statistics.median(column) for column in zip(*rounds, strict=True))
    spread = " ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"| {name} | {ours:.3f} | {plain:.3f} | **{statistics.median(ratios):.3f}** ({spread}) |"


def _one_process(settings: Settings) -> list[tuple[float, float]]:
    return _alternate(_titan_step(settings), _plain_step(build(settings.shape), settings), settings)


def _two_processes(settings: Settings) -> list[tuple[float, float]]:
    return _alternate(_titan_step(settings), _plain_step(_sharded_by_hand(settings.shape), settings), settings)


def _titan_step(settings: Settings) -> Step:
    model = laid_out(settings.shape, Degrees())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    microbatch, count = one_row(settings.shape)

    def step() -> None:
        model.forward_backward([microbatch], total_loss, count * dist.get_world_size())
        model.clip_grad_norm(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _plain_step(model: nn.Module, settings: Settings) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    microbatch, count = one_row(settings.shape)

    def step() -> None:
        loss = total_loss(model(*microbatch.args, **microbatch.kwargs), None) / (count * dist.get_world_size())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if isinstance(norm, DTensor):
            norm.full_tensor()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sharded_by_hand(shape: DecoderConfig) -> nn.Module:
    """Shard a decoder as one would without titan-parallel, in the same units."""
    model = build(shape)
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


if __name__ == "__main__":
    main()
