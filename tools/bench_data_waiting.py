"""How long the loop of a titan-train run waits for its batches; for bench_data.py, as it needs all of the workspace."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from titan_train import load
from titan_train.assembly import assemble
from titan_train.check import check
from titan_train.device import Peak
from titan_train.distributed import join_processes
from titan_train.loop import train
from titan_train.metrics import Meter
from titan_train.signals import StopSignal


class Timed:
    """A loader whose batches are waited for with a watch."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self._loader)
        finally:
            self.seconds += time.perf_counter() - begin


def waiting_share(folder: Path, settings: list[tuple[str, str]], steps: int) -> float:
    """Train the debug config on one process; return the share of the loop's time that is spent waiting for batches."""
    folder.mkdir(exist_ok=True)
    given = [("run.folder", mkdtemp(dir=folder)), ("training.steps", str(steps)), ("checkpoint.interval", "0")]
    config = load("debug", [*given, *settings]).config
    with StopSignal() as stop, join_processes("cpu") as process:
        run = assemble(check(config, process.world_size), process)
        timed = Timed(run.loader)
        next(timed)  # the first batch has nothing to hide behind
        timed.seconds = 0.0
        meter = Meter(
            [],
            total_steps=steps,
            flops_per_token=lambda seq_len: 1.0,
            peak=Peak(1.0, "none"),
            world_size=1,
            device=process.device,
        )
        outcome = train(replace(run, loader=timed), meter, stop)
        run.loader.close()
        run.checkpointer.close()
    return timed.seconds / outcome.seconds
