"""Before a run: do the settings, the model and the layout fit together?

`check` is called by the launcher, for one message before there are processes, and by each rank. What it works out on
the way is a `Checked`, from which `titan_train.assembly.assemble` builds the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import titan_data
import titan_model
from titan_model import DecoderConfig
from titan_parallel import (
    Degrees,
    LayoutError,
    ParallelOptions,
    ParallelPlan,
    check_pipeline,
    check_plan,
    choose_microbatches,
)
from titan_train.config import Config
from titan_train.config.parallel import with_keys
from titan_train.data import load_tokenizer, sequence_lengths
from titan_train.errors import ConfigError


@dataclass(frozen=True)
class Checked:
    """Settings that fit together, and what follows from them.

    Attributes:
        config: The settings.
        model_config: The decoder's shape.
        plan: The roles of the decoder's modules, for titan-parallel.
        degrees: The layout over the processes, without -1.
        options: The other choices of `[parallel]`, for titan-parallel.
        tokenizer: The tokenizer.
        microbatch_size: Sequences of one forward pass on a rank.
    """

    config: Config
    model_config: DecoderConfig
    plan: ParallelPlan
    degrees: Degrees
    options: ParallelOptions
    tokenizer: titan_data.Tokenizer
    microbatch_size: int


def check(config: Config, world_size: int) -> Checked:
    """Check settings against one another, the model and the layout, before anything is started or allocated.

    Args:
        config: The settings.
        world_size: Number of processes.

    Returns:
        The settings with what follows from them.

    Raises:
        ConfigError: If settings contradict one another, or the layout does not fit the world size or the model.
    """
    shape = model_config(config)
    plan = titan_model.parallel_plan(shape)
    degrees, options = _layout(config, world_size, shape, plan)
    tokenizer = load_tokenizer(config.data)
    size, wrong = _microbatch_size(config, degrees, options)
    for key, length in sequence_lengths(config).items():
        if length > shape.max_seq_len:
            wrong.append(f"{key} {length} is over the model's max_seq_len {shape.max_seq_len}")
    if config.checkpoint.huggingface:
        wrong += _cannot_be_exported(shape)
    if shape.vocab_size < (needed := tokenizer.vocab_size):
        wrong.append(
            f"model.vocab_size {shape.vocab_size} is less than the tokenizer's {needed}: "
            f"set model.vocab_size = {needed} (or more), or another data.tokenizer than {config.data.tokenizer!r}"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
    return Checked(config, shape, plan, degrees, options, tokenizer, size)


def _cannot_be_exported(shape: DecoderConfig) -> list[str]:
    """Return why checkpoints cannot become folders for transformers: at the start, not when the first one is saved."""
    try:
        rules = titan_model.huggingface_map(shape).rules
    except ValueError as error:
        return [f"checkpoint.huggingface: {error}"]
    without = [name for rule in rules if not rule.external for name in rule.internal]
    if not without:
        return []
    return [
        f"checkpoint.huggingface: transformers has no place for the experts' selection bias ({without[0]}), without "
        "which the model chooses other experts: set moe.balance_bias_rate = 0, or checkpoint.huggingface = false"
    ]


def model_config(config: Config) -> DecoderConfig:
    """Return the decoder's shape: the preset, with the changes of `[model]`, `[rope]` and `[moe]`.

    Raises:
        ConfigError: If there is no such preset or the numbers do not fit together.
    """
    changes, moe = _given(config.model.model_dump(exclude={"preset"})), _given(config.moe.model_dump())
    try:
        shape = titan_model.preset(config.model.preset)
        if moe and shape.moe is None:
            with_experts = [name for name in titan_model.preset_names() if titan_model.preset(name).moe]
            raise ConfigError(
                f"moe.{next(iter(moe))}: model.preset {config.model.preset!r} has no experts; "
                f"these have: {', '.join(with_experts)}"
            )
        if shape.moe is not None:
            changes["moe"] = replace(shape.moe, **moe)
        changes |= _rope_scaling(config)
        return replace(shape, **changes)
    except KeyError as error:
        raise ConfigError(f"model.preset: {error.args[0]}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _rope_scaling(config: Config) -> dict[str, Any]:
    """Return the change that `[rope]` makes to the shape.

    Raises:
        ConfigError: If values are given without a type that has them.
    """
    kind, values = config.rope.type, _given(config.rope.model_dump(exclude={"type"}))
    if kind is None or kind == "default":
        if values:
            needed = (
                "has no settings" if kind else 'needs rope.type = "linear", "dynamic", "yarn", "llama3" or "longrope"'
            )
            raise ConfigError(f"rope.{next(iter(values))}: {'rope.type default' if kind else 'it'} {needed}")
        return {} if kind is None else {"rope_scaling": None}
    return {"rope_scaling": titan_model.rope_scaling(kind, **values)}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, with tuples for lists, as configs of titan-model have them."""
    given = {key: value for key, value in values.items() if value is not None}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _layout(
    config: Config, world_size: int, shape: DecoderConfig, plan: ParallelPlan
) -> tuple[Degrees, ParallelOptions]:
    """Return degrees and options of `[parallel]`, checked against the world size and the model's plan."""
    blocks = [name.replace("*", str(i)) for name in plan["blocks"] for i in range(shape.n_layers)]
    try:
        degrees = config.parallel.degrees().resolve(world_size)
        options = config.parallel.options(config.training.dtype)
        if degrees.cp > 1 and "attention" not in plan:
            raise ConfigError(f"parallel.cp {degrees.cp}: {_why_sequences_stay_whole(shape)}")
        for length in sequence_lengths(config).values():
            check_plan(plan, degrees, sequence_length=length, options=options)
        check_pipeline(degrees.pp, options.pipeline, blocks=blocks)
    except LayoutError as error:
        raise ConfigError(f"[parallel] {with_keys(str(error))}") from None
    return degrees, options


def _why_sequences_stay_whole(shape: DecoderConfig) -> str:
    """Return why ranks cannot share the sequences of a model."""
    if shape.rope_scaling is None or not shape.rope_scaling.depends_on_length:
        return (
            f"attention with a sliding window (model.window {shape.window}) is not supported under context "
            "parallelism yet; set parallel.cp = 1"
        )
    return (
        f"the model's rotary positions are scaled by the length of each document ({shape.rope_scaling}), which no rank "
        'has all of; set parallel.cp = 1 or another rope.type, such as "yarn"'
    )


def _microbatch_size(config: Config, degrees: Degrees, options: ParallelOptions) -> tuple[int, list[str]]:
    """Return the sequences of one forward pass on a rank, and what is wrong with the sizes of batches."""
    batch_size, readers = config.training.global_batch_size, degrees.dp_world_size
    if batch_size % readers:
        near = round(batch_size / readers) * readers or readers
        wrong = (
            f"training.global_batch_size {batch_size} cannot be split over {readers} data-parallel ranks; {near} could"
        )
        return 0, [wrong]
    per_rank, size = batch_size // readers, config.training.microbatch_size
    if size and per_rank % size:
        return size, [f"training.microbatch_size {size} does not divide a rank's {per_rank} sequences"]
    try:
        size = size or per_rank // choose_microbatches(options.pipeline, degrees.pp, per_rank)
        check_pipeline(degrees.pp, options.pipeline, microbatches=per_rank // size)
    except LayoutError as error:
        where = f"a rank has {per_rank} sequences of training.global_batch_size, in training.microbatch_size"
        return 0, [f"[parallel] {with_keys(str(error))} ({where})"]
    return size, []
