"""What a run says for itself at its beginning and its end."""

from __future__ import annotations

import os
import shlex

from rich.console import Console
from rich.markup import escape

import titan_model
from titan_parallel import MESH_DIMS, bubble_share
from titan_train.assembly import Run
from titan_train.hardware import Peak
from titan_train.loop import Outcome
from titan_train.metrics import Meter
from titan_train.sampling import continue_prompt
from titan_train.settings import Settings, shown

_SAMPLE_CONTEXT = 128  # tokens: enough to see words in, short enough for a CPU


def print_start(console: Console, settings: Settings, run: Run, resumed_from: str | None) -> None:
    """Say what will be trained, where, and from which step."""
    config, shape = run.config, run.model_config
    sizes = {name: run.model.mesh[name].size() for name in MESH_DIMS}
    split = "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)
    rows, length = config.training.global_batch_size, config.training.seq_len
    sources = ", ".join(run.loader.accounting())
    switches = "".join(f", {rows} x {s.seq_len} after step {s.from_step}" for s in config.data.stages if s.seq_len)
    lines = {
        "config": settings.name,
        "model": f"{config.model.preset}, {titan_model.count_parameters(shape):,} parameters, {config.training.dtype}",
        "data": f"{sources}; tokenizer {config.data.tokenizer}; {rows} x {length} tokens per step{switches}",
        "layout": f"{run.process.world} process(es) on {run.process.device.type}{split}",
        **_pipeline(run),
        "folder": config.run.folder,
    }
    _print_table(console, lines)
    step, total = run.progress.step, config.training.steps
    if resumed_from is None:
        _print(console, f"[bold]starting[/] at step 0 of {total}")
    elif step >= total:
        _print(console, f"[bold]resumed[/] from {resumed_from}: step {step} of {total}, nothing is left to do")
    else:
        _print(console, f"[bold]resumed[/] from {resumed_from}: step {step} of {total}")


def _pipeline(run: Run) -> dict[str, str]:
    """Say how the stages run and what they leave idle, if there are any."""
    options, pp = run.config.parallel, run.model.mesh["pp"].size()
    if pp == 1:
        return {}
    rows = run.config.training.global_batch_size // run.place.world
    count = rows // run.microbatch_size
    stages = pp * len(run.model.parts)
    idle = bubble_share(options.pipeline_schedule, pp, len(run.model.parts), count)
    return {
        "pipeline": f"{options.pipeline_schedule}, {stages} stages, {count} microbatches per step, idle at least "
        f"{idle:.1%} of the time"
    }


def print_stopped(console: Console, settings: Settings, run: Run) -> None:
    """Say that the run was saved and how to go on."""
    _print(console, f"[bold yellow]stopped[/] and saved at step {run.progress.step} of {run.config.training.steps}")
    _print_table(console, {"go on": _command(settings, run, run.config.training.steps)})


def sample(run: Run) -> str | None:
    """Return the continuation of the configured prompt, or None if none is wanted. All ranks call it together."""
    wanted = run.config.sample
    if wanted.tokens == 0:
        return None
    tp = run.model.mesh["tp"].size()
    context = min(run.config.training.seq_len, _SAMPLE_CONTEXT) // tp * tp  # a split sequence must divide
    bos = [run.tokenizer.bos_id] if run.tokenizer.bos_id is not None else []
    tokens = continue_prompt(
        run.model.predict,
        [*bos, *run.tokenizer.encode(wanted.prompt)],
        max_new_tokens=wanted.tokens,
        context=context,
        temperature=wanted.temperature,
        stop=run.tokenizer.eos_id,
        seed=run.config.run.seed,
        device=run.process.device,
    )
    return run.tokenizer.decode(tokens)


def print_summary(
    console: Console, settings: Settings, run: Run, meter: Meter, peak: Peak, outcome: Outcome, text: str | None
) -> None:
    """Say what came of the run, where everything lies and what to try next."""
    config, folder = run.config, run.config.run.folder
    if meter.first is not None:
        speed = outcome.tokens / outcome.seconds
        world = run.process.world
        mean, (first_step, first_loss) = sum(meter.recent) / len(meter.recent), meter.first
        of = f"mean of the last {len(meter.recent)} steps" if len(meter.recent) > 1 else "of the last step"
        _print(console, f"[bold green]done[/]: {outcome.tokens:,} tokens in {outcome.seconds:.1f} s")
        _print_table(
            console,
            {
                "final loss": f"{mean:.4f} nats per token ({of}), from {first_loss:.4f} at step {first_step}",
                "speed": f"{speed:,.0f} tokens/s, {speed / world:,.0f} per process, saving included",
                "MFU": f"{meter.mfu(outcome.seconds):.1%} of {peak.flops * world / 1e9:,.0f} GFLOP/s ({peak.source}); "
                "6 FLOPs per weight and causal pair, attention's causal half counted once",
            },
        )
    if text is not None:
        _print_table(console, {"sample": ""})
        for line in f"{config.sample.prompt}{text}".splitlines():
            _print(console, f"  [dim]|[/] {escape(line)}")
    board = ["tensorboard/"] if config.metrics.tensorboard else []
    _print_table(
        console,
        {
            "files": f"{folder}: {', '.join(['config.toml', 'metrics.jsonl', *board, 'checkpoints/'])}",
            "next": _command(settings, run, 2 * config.training.steps),
            **({"look": f"{_prefix()}tensorboard --logdir {folder}/tensorboard"} if board else {}),
        },
    )


def _command(settings: Settings, run: Run, steps: int) -> str:
    """Return the command that goes on with this run up to `steps`, with the flags that were given to it."""
    values = {
        f"{section}.{key}": value for section, table in run.config.model_dump().items() for key, value in table.items()
    }
    given = [key for key, origin in settings.origins.items() if origin == f"--{key}" and key != "training.steps"]
    flags = [f"--{key} {_as_flag(values[key])}" for key in given]
    if steps != run.config.training.steps or settings.origins.get("training.steps") == "--training.steps":
        flags.append(f"--training.steps {steps}")
    world = str(run.process.world)
    if world != "1" and os.environ.get("LOCAL_WORLD_SIZE") == world:  # all on this machine
        flags.insert(0, f"--nproc {world}")
    return _prefix() + " ".join(["titan-train", "--config", shlex.quote(settings.name), *flags])


def _as_flag(value: object) -> str:
    return shlex.quote(value if isinstance(value, str) else shown(value).strip('"'))


def _prefix() -> str:
    return "uv run " if "UV_RUN_RECURSION_DEPTH" in os.environ else ""


def _print_table(console: Console, lines: dict[str, str]) -> None:
    for name, text in lines.items():
        _print(console, f"  [bold]{name:<10}[/] {escape(text)}")


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
