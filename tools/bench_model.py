"""How fast titan-model's decoder trains, against `transformers`' Llama of the same shape in the same run.

One process, whole training steps: forward, loss, backward, AdamW. Both models take turns, round by round, so that
whatever else slows the machine slows both; the figure is the median of the rounds' ratios. The share of peak is the
model's FLOPs (causal attention counted once) over the best rate of large matrix products seen in the same run.

    uv run python tools/bench_model.py                        # the table of docs/performance.md
    uv run python tools/bench_model.py --batch 1 --dtype float32 --rounds 3
    uv run python tools/bench_model.py --memory               # peak memory of the loss
    uv run python tools/bench_model.py --profile --batch 1    # where the time goes, by operation
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import titan_model
from titan_model import DecoderConfig

SHAPE = DecoderConfig(
    vocab_size=16_384, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, ffn_dim=2048, max_seq_len=1024
)  # 110.1 million parameters
MEMORY_SHAPE, MEMORY_SEQ_LEN = titan_model.preset("llama3_2_1b"), 8192
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    dtype: str
    batch: int
    compiled: bool


def main() -> None:
    """Run the benchmark and print its table as Markdown."""
    options = _arguments()
    torch.manual_seed(0)
    print(_machine())
    if options.profile:
        _profile(options)
        return
    if options.memory:
        _memory_table()
        return
    cases = [
        Case(dtype, batch, compiled)
        for dtype in options.dtype
        for batch in options.batch
        for compiled in ([False, True] if options.compile else [False])
    ]
    print("| dtype | batch | | titan tok/s | transformers eager tok/s | ratio (median; all) | titan, share of peak |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        print(_line(case, options), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per round and model")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes instead")
    parser.add_argument("--memory", action="store_true", help="print the loss's peak memory instead")
    return parser.parse_args()


def _line(case: Case, options: argparse.Namespace) -> str:
    ours, theirs = _titan_step(case, options), _transformers_step(case, options)
    for step in (ours, theirs, ours, theirs):  # compiles, allocates, warms up
        step()
    peak = _peak(getattr(torch, case.dtype), options.device)
    rounds = []
    for _ in range(options.rounds):
        rounds.append((_seconds(ours, options), _seconds(theirs, options)))
        peak = max(peak, _peak(getattr(torch, case.dtype), options.device))
    tokens = case.batch * options.seq_len
    ratios = sorted(theirs / ours for ours, theirs in rounds)
    titan, other = (tokens / statistics.median(column) for column in zip(*rounds, strict=True))
    share = titan * titan_model.flops_per_token(SHAPE, options.seq_len) / peak
    spread = " ".join(f"{ratio:.2f}" for ratio in ratios)
    mode = "compiled" if case.compiled else "eager"
    return (
        f"| {case.dtype} | {case.batch} | {mode} | {titan:.0f} | {other:.0f} | "
        f"**{statistics.median(ratios):.2f}** ({spread}) | {share:.0%} of {peak / 1e9:.0f} GFLOP/s |"
    )


def _titan_step(case: Case, options: argparse.Namespace) -> Step:
    config = replace(SHAPE, max_seq_len=options.seq_len)
    model = titan_model.build(config, device=options.device)
    titan_model.init_parameters(model.named_parameters(), config, seed=0)
    if case.compiled:
        model.compile()
    tokens, labels = _data(case, options)
    count = labels.numel()

    def loss() -> Tensor:
        sums: titan_model.LossSums = model(tokens, labels=labels)
        return sums.total / count

    return _training_step(model, loss, case, options)


def _transformers_step(case: Case, options: argparse.Namespace) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        num_hidden_layers=SHAPE.n_layers,
        num_attention_heads=SHAPE.n_heads,
        num_key_value_heads=SHAPE.n_kv_heads,
        intermediate_size=SHAPE.ffn_dim,
        max_position_embeddings=options.seq_len,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(shape).to(options.device)
    assert model.config._attn_implementation == "sdpa"
    tokens, labels = _data(case, options)

    def loss() -> Tensor:
        value: Tensor = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        return value

    return _training_step(model, loss, case, options)


def _training_step(model: nn.Module, loss: Callable[[], Tensor], case: Case, options: argparse.Namespace) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mixed = case.dtype == "bfloat16"

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=mixed):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _data(case: Case, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, SHAPE.vocab_size, (case.batch, options.seq_len + 1), device=options.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _seconds(step: Step, options: argparse.Namespace) -> float:
    """Return the seconds of one step, averaged over the steps of a round."""
    steps: int = options.steps
    _wait(options.device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(options.device)
    return (time.perf_counter() - started) / steps


def _peak(dtype: torch.dtype, device: str) -> float:
    """Return the best rate of a large matrix product in FLOP/s."""
    size = 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * float(size) ** 3 / best


def _profile(options: argparse.Namespace) -> None:
    for dtype in options.dtype:
        for batch in options.batch:
            case = Case(dtype, batch, False)
            for name, make in (("titan", _titan_step), ("transformers", _transformers_step)):
                step = make(case, options)
                step()
                with torch.profiler.profile() as profiler:
                    step()
                print(f"\n{name}, {dtype}, batch {batch}")
                print(
                    profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45)
                )


def _memory_table() -> None:
    """Print the peak memory of head and loss, forward and backward, beyond inputs, weight and their gradients."""
    print(f"V = {MEMORY_SHAPE.vocab_size:,}, S = {MEMORY_SEQ_LEN:,}, B = 1, D = {MEMORY_SHAPE.dim:,}\n")
    print("| dtype | unchunked, GiB | chunked, GiB | chunked / unchunked |")
    print("|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        # A process each: what the allocator has kept of one would hide what the other needs.
        plain, chunked = (
            float(
                subprocess.check_output(
                    [sys.executable, "-c", f"import bench_model; print(bench_model.loss_memory({dtype!r}, {way}))"],
                    cwd=Path(__file__).parent,
                )
            )
            for way in (False, True)
        )
        print(f"| {dtype} | {plain:.2f} | {chunked:.2f} | **{chunked / plain:.2f}** |", flush=True)


def loss_memory(dtype: str, chunked: bool) -> float:
    """Return the GiB by which forward and backward of head and loss raise this process's peak memory.

    Args:
        dtype: Of the hidden states and of the head.
        chunked: Whether by `linear_cross_entropy`, or by all logits and torch's cross-entropy.
    """
    config, kind = MEMORY_SHAPE, getattr(torch, dtype)
    x = torch.randn(1, MEMORY_SEQ_LEN, config.dim, dtype=kind, requires_grad=True)
    weight = (torch.randn(config.vocab_size, config.dim) * 0.02).to(kind).requires_grad_()
    labels = torch.randint(0, config.vocab_size, (1, MEMORY_SEQ_LEN))
    x.grad, weight.grad = torch.ones_like(x), torch.ones_like(weight)
    before = _resident()
    with _PeakMemory() as peak:
        if chunked:
            loss = titan_model.linear_cross_entropy(x, weight, labels).total
        else:
            loss = F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), labels.flatten(), reduction="sum")
        (loss / labels.numel()).backward()  # type: ignore[no-untyped-call]
    return (peak.bytes - before) / 2**30


class _PeakMemory:
    """Watches this process's resident memory from a thread, as the kernel's own high-water mark cannot be reset."""

    def __enter__(self) -> _PeakMemory:
        self.bytes = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _machine() -> str:
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (
        f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
    )


if __name__ == "__main__":
    main()
