"""A run on one process, from beginning to end: join the group, check, assemble, resume, train, summarize."""

from __future__ import annotations

from contextlib import closing
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console

from titan_ckpt import CheckpointError
from titan_data import DataError
from titan_model import flops_per_token
from titan_train.assembly import Run, assemble
from titan_train.check import check
from titan_train.console import RunPrinter
from titan_train.device import find_peak
from titan_train.distributed import Process, join_processes
from titan_train.errors import ExitCode, TrainingError
from titan_train.loop import train
from titan_train.metrics import FileSink, Meter, Sink, TensorBoardSink, TerminalSink
from titan_train.sampling import sample
from titan_train.settings import Settings, to_toml
from titan_train.signals import StopSignal


def run(settings: Settings) -> int:
    """Train as the settings say, and resume what is stored in the run's folder.

    Args:
        settings: Settings from `titan_train.load`.

    Returns:
        An `ExitCode`.

    Raises:
        ConfigError: If a setting is invalid.
        TrainingError: If the run cannot continue.
    """
    try:
        with StopSignal() as stop, join_processes(settings.config.run.device) as process:
            return _run(settings, process, stop)
    except (CheckpointError, DataError) as error:
        raise TrainingError(str(error)) from error


def _run(settings: Settings, process: Process, stop: StopSignal) -> int:
    parts = assemble(check(settings.config, process.world_size), process)
    printer = RunPrinter(Console(quiet=not process.is_first), settings, parts)
    # Closed also if training fails: a save in progress is of an earlier, healthy step.
    with closing(parts.loader), closing(parts.checkpointer):
        parts.checkpointer.acquire_lock()  # another job in this folder is found now, not at the first save
        resumed_from = _resume(parts)
        if process.is_first:
            folder = Path(settings.config.run.folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.toml").write_text(to_toml(settings.config, settings.origins), "utf-8")
        meter = _meter(parts, printer.console)
        printer.print_start(resumed_from)
        with closing(meter):
            outcome = train(parts, meter, stop)
    if outcome.stopped:
        printer.print_stopped()
        return ExitCode.STOPPED
    text = sample(parts)  # on every rank: a sharded model needs all of them
    printer.print_summary(outcome, meter, text)
    return ExitCode.DONE


def _resume(parts: Run) -> str | None:
    """Load the newest checkpoint of the run's folder, if any; return its path, or None for a new run."""
    config = parts.config
    found = parts.checkpointer.load(parts.state(), on_corruption=config.checkpoint.on_corruption)
    if found is None and config.checkpoint.resume == "required":
        raise TrainingError(
            f'checkpoint.resume is "required", but there is no checkpoint in {parts.checkpointer.directory}: set '
            "run.folder to that of the run to resume, or start a new run with --checkpoint.resume auto"
        )
    return found.path if found else None


def _meter(parts: Run, console: Console) -> Meter:
    config, process, resumed = parts.config, parts.process, parts.progress.step
    dtype = torch.bfloat16 if config.training.dtype == "bfloat16" else torch.float32
    return Meter(
        _sinks(parts, console, resumed) if process.is_first else [],
        total_steps=config.training.steps,
        flops_per_token=cache(partial(flops_per_token, parts.model_config)),
        peak=find_peak(process.device, dtype),
        world_size=process.world_size,
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
