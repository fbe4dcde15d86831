"""Metrics of a run: computed by a `Meter`, written by sinks to the terminal, a file and TensorBoard.

The loop gives a `StepRecord` for each reported step; the meter adds speed, MFU and memory, and hands `StepMetrics` to
the sinks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape

from titan_train.device import Peak, memory_in_use


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What the loop knows of a reported step.

    Attributes:
        step: The step.
        losses: Loss of each step since the last report, this one's last, in nats per scored token.
        grad_norm: Global norm of this step's gradients before clipping.
        lr: Learning rate of this step.
        tokens: Tokens trained since the run began.
        sources: By source, counts since the run began (tokens, documents, epoch and what else the loader counts) and,
            if there are several, `loss`: the mean over its scored tokens since the last report, without z-loss.
        more: Metrics of the model at this step, by tag (`experts/max_load`).
    """

    step: int
    losses: list[float]
    grad_norm: float
    lr: float
    tokens: int
    sources: Mapping[str, Mapping[str, float]]
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepMetrics:
    """What is reported of a step.

    Attributes:
        step: The step.
        loss: Loss over the global batch, in nats per scored token.
        grad_norm: Global norm of the gradients before clipping.
        lr: Learning rate.
        tokens: Tokens trained since the run began.
        tokens_per_second: Speed over all ranks, since the last report.
        mfu: The model's own FLOPs as a fraction of the devices' peak.
        memory_gib: Peak memory of the reporting process.
        seconds_left: Expected time to the last step.
        sources: Counts and losses by source, as in `StepRecord`.
        more: Metrics of the model, by tag.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    mfu: float
    memory_gib: float
    seconds_left: float
    sources: Mapping[str, Mapping[str, float]]
    more: Mapping[str, float] = field(default_factory=dict)


_SHOWN = 4  # sources whose losses fit into a line of the terminal; the files have all


class Sink(Protocol):
    """Writes reported metrics somewhere."""

    def write(self, metrics: StepMetrics) -> None:
        """Write one report."""
        ...

    def close(self) -> None:
        """Flush, and release resources."""
        ...


class Meter:
    """Computes metrics from step records and hands them to the sinks. Ranks without sinks only compute.

    Args:
        sinks: Where reports go.
        total_steps: Last step.
        flops_per_token: Model FLOPs of training, forward and backward, for a number of tokens per sequence.
        peak: Peak of one process's device.
        world_size: Number of processes.
        device: Device whose memory is reported.

    Attributes:
        first: The first step that this process trained and its loss, or None before the first report.
        recent: Losses of the steps of the last report.
        peak: As given.
    """

    def __init__(
        self,
        sinks: list[Sink],
        *,
        total_steps: int,
        flops_per_token: Callable[[int], float],
        peak: Peak,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.first: tuple[int, float] | None = None
        self.recent: list[float] = []
        self.peak = peak
        self._sinks = sinks
        self._total_steps = total_steps
        self._flops_per_token = flops_per_token
        self._peak_of_all = peak.flops * world_size
        self._device = device
        self._flops = 0.0  # of all counted steps
        self.start(0)

    def start(self, step: int) -> None:
        """Start the clock after a step."""
        self._last_step, self._last_time = step, time.perf_counter()
        self._new_tokens, self._new_flops = 0, 0.0  # since then

    def count(self, tokens: int, seq_len: int) -> None:
        """Count a step's tokens, over all ranks, that were trained in sequences of `seq_len`."""
        flops = tokens * self._flops_per_token(seq_len)
        self._new_tokens += tokens
        self._new_flops += flops
        self._flops += flops

    def report(self, record: StepRecord) -> StepMetrics:
        """Compute the metrics of the step just done, write them to the sinks and return them."""
        step, losses = record.step, record.losses
        seconds = time.perf_counter() - self._last_time
        self.first = self.first or (step - len(losses) + 1, losses[0])
        self.recent = losses
        metrics = StepMetrics(
            step=step,
            loss=losses[-1],
            grad_norm=record.grad_norm,
            lr=record.lr,
            tokens=record.tokens,
            tokens_per_second=self._new_tokens / seconds,
            mfu=self._new_flops / seconds / self._peak_of_all,
            memory_gib=memory_in_use(self._device) / 2**30,
            seconds_left=(self._total_steps - step) * seconds / (step - self._last_step),
            sources=record.sources,
            more=record.more,
        )
        for sink in self._sinks:
            sink.write(metrics)
        self.start(step)
        return metrics

    def mfu(self, seconds: float) -> float:
        """Return the model FLOPs of all counted steps as a fraction of what all devices could do in that time."""
        return self._flops / seconds / self._peak_of_all

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()


class TerminalSink:
    """One line per report; colored on a terminal, without control codes in a file."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps

    def write(self, metrics: StepMetrics) -> None:
        """Print the line."""
        width = len(str(self._total_steps))
        losses = {name: numbers["loss"] for name, numbers in metrics.sources.items() if "loss" in numbers}
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        by_source = f" ({escape(shown)})" if 0 < len(losses) <= _SHOWN else ""
        more = "".join(f"  {tag.rpartition('/')[2]} {value:.3g}" for tag, value in metrics.more.items())
        self._console.print(
            f"[bold]step {metrics.step:>{width}}/{self._total_steps}[/]  "
            f"loss [bold green]{metrics.loss:.4f}[/]{by_source}  grad {metrics.grad_norm:.3f}  lr {metrics.lr:.2e}  "
            f"[cyan]{metrics.tokens_per_second:,.0f} tok/s[/]  MFU {metrics.mfu:.1%}  "
            f"mem {metrics.memory_gib:.2f} GiB{more}  eta {clock(metrics.seconds_left)}",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Do nothing: the console stays open."""


class FileSink:
    """One JSON object per line and report, in full precision.

    Lines of steps after `resumed_step` are dropped: the resumed run trains these steps again.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                step = _step_of(line)
                if step is not None and step <= resumed_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Append the line."""
        values = asdict(metrics)
        more = values.pop("more")
        self._file.write(json.dumps(values | more) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """TensorBoard events; those after `resumed_step` are hidden, as in `FileSink`."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge = resumed_step + 1 if folder.exists() else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def write(self, metrics: StepMetrics) -> None:
        """Write one scalar per metric."""
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()

    def close(self) -> None:
        """Flush the events."""
        self._writer.close()


def scalars(metrics: StepMetrics) -> Mapping[str, float]:
    """Return the scalars that TensorBoard shows, by tag."""
    return {
        "train/loss": metrics.loss,
        "train/grad_norm": metrics.grad_norm,
        "train/lr": metrics.lr,
        "train/tokens": metrics.tokens,
        "speed/tokens_per_second": metrics.tokens_per_second,
        "speed/mfu": metrics.mfu,
        "speed/memory_gib": metrics.memory_gib,
        **metrics.more,
        **{f"data/{name}/{what}": n for name, counts in metrics.sources.items() for what, n in counts.items()},
    }


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss or mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # a line that was cut short when the process was killed
