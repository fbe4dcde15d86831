"""A run from beginning to end, on one process: join, assemble, resume, train, sum up."""

from __future__ import annotations

from contextlib import closing
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console

from titan_ckpt import CheckpointError
from titan_data import DataError
from titan_model import flops_per_token
from titan_train import report
from titan_train.assembly import Run, assemble, check
from titan_train.errors import ExitCode, TrainingError
from titan_train.hardware import Peak, find_peak
from titan_train.loop import train
from titan_train.metrics import FileSink, Meter, Sink, TensorBoardSink, TerminalSink
from titan_train.process import Process, join_processes
from titan_train.settings import Settings, to_toml
from titan_train.signals import StopSignal


def run(settings: Settings) -> int:
    """Train as the settings say, resuming what lies in the run folder.

    Args:
        settings: From `load`.

    Returns:
        An `ExitCode`.

    Raises:
        ConfigError: If a setting turns out not to work.
        TrainingError: If the run cannot go on.
    """
    try:
        with StopSignal() as stop, join_processes(settings.config.run.device) as process:
            return _run(settings, process, stop)
    except (CheckpointError, DataError) as error:
        raise TrainingError(str(error)) from error


def _run(settings: Settings, process: Process, stop: StopSignal) -> int:
    config = settings.config
    check(config, process.world)
    console = Console(quiet=not process.is_first)
    parts = assemble(config, process)
    # Closed also when training fails: a save still in flight is a good one, from before.
    with closing(parts.loader), closing(parts.checkpointer):
        parts.checkpointer.claim()  # another job in this folder is found out now, not at the first save
        resumed_from = _resume(parts)
        peak = find_peak(process.device, _dtype(parts))
        if process.is_first:
            folder = Path(config.run.folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.toml").write_text(to_toml(config, settings.origins), "utf-8")
        report.print_start(console, settings, parts, resumed_from)
        with closing(_meter(parts, peak, console)) as meter:
            outcome = train(parts, meter, stop)
    if outcome.stopped:
        report.print_stopped(console, settings, parts)
        return ExitCode.STOPPED
    sample = report.sample(parts)  # on every rank: a sharded model needs all of them
    report.print_summary(console, settings, parts, meter, peak, outcome, sample)
    return ExitCode.DONE


def _resume(parts: Run) -> str | None:
    """Go on from what lies in the run's folder; return which checkpoint that was, None to begin."""
    config = parts.config
    found = parts.checkpointer.load(parts.state(), on_damage=config.checkpoint.on_damage)
    if found is None and config.checkpoint.resume == "required":
        raise TrainingError(
            f'checkpoint.resume is "required", and there is no checkpoint in {parts.checkpointer.folder}: give the '
            "run.folder of the run to go on with, or begin one with --checkpoint.resume auto"
        )
    return found.path if found else None


def _meter(parts: Run, peak: Peak, console: Console) -> Meter:
    config, process, resumed = parts.config, parts.process, parts.progress.step
    return Meter(
        _sinks(parts, console, resumed) if process.is_first else [],
        total_steps=config.training.steps,
        flops_per_token=cache(partial(flops_per_token, parts.model_config)),
        peak=peak,
        world=process.world,
        device=process.device,
    )


def _sinks(parts: Run, console: Console, resumed: int) -> list[Sink]:
    folder = Path(parts.config.run.folder)
    sinks: list[Sink] = [
        TerminalSink(console, parts.config.training.steps),
        FileSink(folder / "metrics.jsonl", resumed),
    ]
    if parts.config.metrics.tensorboard and resumed < parts.config.training.steps:
        sinks.append(TensorBoardSink(folder / "tensorboard", resumed))
    return sinks


def _dtype(parts: Run) -> torch.dtype:
    return torch.bfloat16 if parts.config.training.dtype == "bfloat16" else torch.float32
