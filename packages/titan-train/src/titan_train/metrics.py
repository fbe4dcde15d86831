"""Figures of a run: to the terminal, to a file, to TensorBoard."""

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

from titan_train.hardware import Peak, memory_in_use


@dataclass(frozen=True)
class StepMetrics:
    """What is known of a reported step.

    Attributes:
        step: The step.
        loss: Its loss over the global batch, in nats per scored token.
        grad_norm: Global norm of its gradients before clipping.
        lr: Its learning rate.
        tokens: Tokens trained since the run began.
        tokens_per_second: Over all ranks, since the last report.
        mfu: Share of the peak that the model's own FLOPs make up.
        memory_gib: Peak memory of the reporting process.
        seconds_left: Expected time to the last step.
        sources: By source, counts since the run began (tokens, documents, epoch and what the loader counts besides)
            and, where there are several, `loss`: the mean over its scored tokens since the last report, without z-loss.
        more: What the model says of the step besides, by tag (`experts/max_load`).
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


_SHOWN = 4  # sources whose losses a line has room for; files have all


class Sink(Protocol):
    """Takes reported figures somewhere."""

    def write(self, metrics: StepMetrics) -> None:
        """Take one report."""
        ...

    def close(self) -> None:
        """Flush and release what is held."""
        ...


class Meter:
    """Turns raw numbers into figures and hands them to the sinks; on ranks without sinks it only computes.

    Args:
        sinks: Where reports go.
        total_steps: Last step.
        flops_per_token: Model FLOPs of training, forward and backward, for a number of tokens per sequence.
        peak: Of one process's device.
        world: Number of processes.
        device: Whose memory is reported.

    Attributes:
        first: The first step that this process did and its loss, or None before the first report.
        recent: Losses of the steps of the last report.
    """

    def __init__(
        self,
        sinks: list[Sink],
        *,
        total_steps: int,
        flops_per_token: Callable[[int], float],
        peak: Peak,
        world: int,
        device: torch.device,
    ) -> None:
        self.first: tuple[int, float] | None = None
        self.recent: list[float] = []
        self._sinks = sinks
        self._total_steps = total_steps
        self._flops_per_token = flops_per_token
        self._peak_of_all = peak.flops * world
        self._device = device
        self._flops = 0.0  # of all steps that were counted
        self.start(0)

    def start(self, step: int) -> None:
        """Start the clock at a step that is done."""
        self._last_step, self._last_time = step, time.perf_counter()
        self._new_tokens, self._new_flops = 0, 0.0  # since then

    def count(self, tokens: int, seq_len: int) -> None:
        """Count a step's tokens, over all ranks, that were trained in sequences of `seq_len`."""
        flops = tokens * self._flops_per_token(seq_len)
        self._new_tokens += tokens
        self._new_flops += flops
        self._flops += flops

    def report(
        self,
        step: int,
        losses: list[float],
        grad_norm: float,
        lr: float,
        tokens: int,
        sources: Mapping[str, Mapping[str, float]],
        more: Mapping[str, float] | None = None,
    ) -> StepMetrics:
        """Compute and write the figures of `step`.

        Args:
            step: The step just done.
            losses: Of the steps since the last report, this one's last.
            grad_norm: Of this step.
            lr: Of this step.
            tokens: Trained since the run began.
            sources: Counts by source since then, and the loss of each.
            more: What else is known of this step, by tag.
        """
        now = time.perf_counter()
        seconds = now - self._last_time
        self.first = self.first or (step - len(losses) + 1, losses[0])
        self.recent = losses
        metrics = StepMetrics(
            step=step,
            loss=losses[-1],
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            tokens_per_second=self._new_tokens / seconds,
            mfu=self._new_flops / seconds / self._peak_of_all,
            memory_gib=memory_in_use(self._device) / 2**30,
            seconds_left=(self._total_steps - step) * seconds / (step - self._last_step),
            sources=sources,
            more=more or {},
        )
        for sink in self._sinks:
            sink.write(metrics)
        self.start(step)
        return metrics

    def mfu(self, seconds: float) -> float:
        """Return the model FLOPs of all steps that were counted, over what the devices' peak allows in that time."""
        return self._flops / seconds / self._peak_of_all

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()


class TerminalSink:
    """One line per report; coloured on a terminal, plain text in a file."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps

    def write(self, metrics: StepMetrics) -> None:
        """Print the line."""
        width = len(str(self._total_steps))
        losses = {name: figures["loss"] for name, figures in metrics.sources.items() if "loss" in figures}
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
        """Nothing is held."""


class FileSink:
    """One JSON object per line and report, in full precision.

    Lines of steps after `resumed_step` belong to a past that the resumed checkpoint undoes: they are dropped.
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
        figures = asdict(metrics)
        more = figures.pop("more")
        self._file.write(json.dumps(figures | more) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """TensorBoard events; those after `resumed_step` are hidden, as in `FileSink`."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # heavy: only where it is used

        purge = resumed_step + 1 if folder.exists() else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def write(self, metrics: StepMetrics) -> None:
        """Write one scalar per figure."""
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()

    def close(self) -> None:
        """Flush the events."""
        self._writer.close()


def scalars(metrics: StepMetrics) -> Mapping[str, float]:
    """Return what TensorBoard shows, by tag."""
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
        return None  # a line that a kill cut short
