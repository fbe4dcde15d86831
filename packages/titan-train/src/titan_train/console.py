"""What a run prints at its beginning and at its end; the lines in between are `titan_train.metrics.TerminalSink`'s."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

import titan_model
from titan_parallel import MESH_DIMS, bubble_share
from titan_train.assembly import Run
from titan_train.loop import Outcome
from titan_train.metrics import Meter
from titan_train.settings import Settings, shown


@dataclass(frozen=True)
class RunPrinter:
    """Prints about one run.

    Attributes:
        console: Where to; quiet on all ranks but one.
        settings: The settings, with where each came from.
        run: The run.
    """

    console: Console
    settings: Settings
    run: Run

    def print_start(self, resumed_from: str | None) -> None:
        """Print what is trained, where, and from which step.

        Args:
            resumed_from: The checkpoint, or None for a new run.
        """
        config, shape, model = self.run.config, self.run.model_config, self.run.model
        sizes = {name: model.mesh[name].size() for name in MESH_DIMS}
        split = "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)
        batch, length = config.training.global_batch_size, config.training.seq_len
        sources = ", ".join(self.run.loader.accounting())
        phases = "".join(f", {batch} x {p.seq_len} after step {p.from_step}" for p in config.data.phases if p.seq_len)
        lines = {
            "config": self.settings.name,
            "model": f"{config.model.preset}, {titan_model.count_parameters(shape):,} parameters, "
            f"{config.training.dtype}",
            "data": f"{sources}; tokenizer {config.data.tokenizer}; {batch} x {length} tokens per step{phases}",
            "layout": f"{self.run.process.world_size} process(es) on {self.run.process.device.type}{split}",
            **_pipeline(self.run),
            "folder": config.run.folder,
        }
        self._table(lines)
        step, total = self.run.progress.step, config.training.steps
        if resumed_from is None:
            self._line(f"[bold]starting[/] at step 0 of {total}")
        elif step >= total:
            self._line(f"[bold]resumed[/] from {resumed_from}: step {step} of {total}, the run is complete")
        else:
            self._line(f"[bold]resumed[/] from {resumed_from}: step {step} of {total}")

    def print_stopped(self) -> None:
        """Print that the run was saved, and the command that resumes it."""
        total = self.run.config.training.steps
        self._line(f"[bold yellow]stopped[/] and saved at step {self.run.progress.step} of {total}")
        self._table({"resume": self._command(total)})

    def print_summary(self, outcome: Outcome, meter: Meter, text: str | None) -> None:
        """Print the result of the run, where its files are, and what to try next.

        Args:
            outcome: How the loop ended.
            meter: Has the losses and the MFU.
            text: A generated sample, if any.
        """
        config, folder = self.run.config, self.run.config.run.folder
        if meter.first is not None:
            self._line(f"[bold green]done[/]: {outcome.tokens:,} tokens in {outcome.seconds:.1f} s")
            self._table(_result(outcome, meter, self.run.process.world_size))
        if text is not None:
            self._table({"sample": ""})
            for line in f"{config.sample.prompt}{text}".splitlines():
                self._line(f"  [dim]|[/] {escape(line)}")
        board = ["tensorboard/"] if config.metrics.tensorboard else []
        lines = {
            "files": f"{folder}: {', '.join(['config.toml', 'metrics.jsonl', *board, 'checkpoints/'])}",
            "next": self._command(2 * config.training.steps),
        }
        self._table(lines | ({"look": f"{_prefix()}tensorboard --logdir {folder}/tensorboard"} if board else {}))

    def _command(self, steps: int) -> str:
        """Return the command that continues this run up to `steps`, with the flags that were given to it."""
        config, origins, process = self.run.config, self.settings.origins, self.run.process
        values = {
            f"{section}.{key}": value for section, table in config.model_dump().items() for key, value in table.items()
        }
        given = [key for key, origin in origins.items() if origin == f"--{key}" and key != "training.steps"]
        flags = [f"--{key} {_as_flag(values[key])}" for key in given]
        if steps != config.training.steps or origins.get("training.steps") == "--training.steps":
            flags.append(f"--training.steps {steps}")
        world_size = str(process.world_size)
        if world_size != "1" and os.environ.get("LOCAL_WORLD_SIZE") == world_size:  # all on this machine
            flags.insert(0, f"--nproc {world_size}")
        return _prefix() + " ".join(["titan-train", "--config", shlex.quote(self.settings.name), *flags])

    def _table(self, lines: dict[str, str]) -> None:
        for name, text in lines.items():
            self._line(f"  [bold]{name:<10}[/] {escape(text)}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def _pipeline(run: Run) -> dict[str, str]:
    """Return a line about the pipeline's stages and their idle time, if there is a pipeline."""
    schedule, pp = run.config.parallel.options(run.config.training.dtype).pipeline.schedule, run.model.mesh["pp"].size()
    if pp == 1:
        return {}
    count = run.config.training.global_batch_size // run.place.dp_world_size // run.microbatch_size
    text = f"{schedule}, {pp * len(run.model.parts)} stages, {count} microbatches per step"
    if not schedule.endswith(".csv"):  # for a schedule of one's own there is no formula
        text += f", idle at least {bubble_share(schedule, pp, len(run.model.parts), count):.1%} of the time"
    return {"pipeline": text}


def _result(outcome: Outcome, meter: Meter, world_size: int) -> dict[str, str]:
    assert meter.first is not None
    first_step, first_loss = meter.first
    mean, speed = sum(meter.recent) / len(meter.recent), outcome.tokens / outcome.seconds
    of = f"mean of the last {len(meter.recent)} steps" if len(meter.recent) > 1 else "of the last step"
    peak = meter.peak
    return {
        "final loss": f"{mean:.4f} nats per token ({of}), from {first_loss:.4f} at step {first_step}",
        "speed": f"{speed:,.0f} tokens/s, {speed / world_size:,.0f} per process, saving included",
        "MFU": f"{meter.mfu(outcome.seconds):.1%} of {peak.flops * world_size / 1e9:,.0f} GFLOP/s ({peak.source}); "
        "6 FLOPs per weight and causal pair, attention's causal half counted once",
    }


def _as_flag(value: object) -> str:
    return shlex.quote(value if isinstance(value, str) else shown(value).strip('"'))


def _prefix() -> str:
    return "uv run " if "UV_RUN_RECURSION_DEPTH" in os.environ else ""
