"""From settings to the parts of a run. The only place where the five packages meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

import titan_data
import titan_model
from titan_ckpt import Checkpointer, HuggingFaceExport, KeepBest
from titan_model import DecoderConfig
from titan_parallel import (
    MESH_DIMS,
    DataAxis,
    Degrees,
    Float8Options,
    LayoutError,
    ParallelModel,
    ParallelOptions,
    PipelineOptions,
    build_mesh,
    check_pipeline,
    check_plan,
    choose_microbatches,
    data_axis,
    parallelize,
)
from titan_train.config import Config
from titan_train.data import DataState, load_tokenizer, open_loader, sequence_lengths
from titan_train.errors import ConfigError
from titan_train.optimizer import Optimizer
from titan_train.process import Process
from titan_train.seams import BatchLoader


class Progress:
    """How far the run has come."""

    def __init__(self) -> None:
        self.step = 0
        self.tokens = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"step": self.step, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over counts."""
        self.step, self.tokens = state["step"], state["tokens"]


@dataclass(frozen=True)
class Run:
    """The parts of a run, ready to train.

    Attributes:
        place: Which part of each batch this process reads.
        microbatch_size: Rows of one forward on this process.
    """

    config: Config
    process: Process
    model_config: DecoderConfig
    model: ParallelModel
    place: DataAxis
    microbatch_size: int
    optimizer: Optimizer
    tokenizer: titan_data.Tokenizer
    loader: BatchLoader
    checkpointer: Checkpointer
    progress: Progress

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint holds, by name."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "data": DataState(self.loader, self.config.data.allow_changes),
            "progress": self.progress,
        }


def check(config: Config, world: int) -> None:
    """Refuse what cannot work, before any process is started or anything is allocated.

    Args:
        config: The settings.
        world: Number of processes.

    Raises:
        ConfigError: If settings contradict one another, or the layout fits the processes or the model not.
    """
    training, model = config.training, model_config(config)
    try:
        degrees = _degrees(config).resolve(world)
        plan = titan_model.parallel_plan(model)
        for length in sequence_lengths(config).values():
            check_plan(plan, degrees, sequence_length=length, options=_options(config))
        blocks = [name.replace("*", str(i)) for name in plan["blocks"] for i in range(model.n_layers)]
        check_pipeline(degrees.pp, _options(config).pipeline, blocks=blocks)
    except LayoutError as error:
        raise ConfigError(f"[parallel] {error}") from None
    data_world = degrees.readers
    wrong = []
    for key, length in sequence_lengths(config).items():
        if length > model.max_seq_len:
            wrong.append(f"{key} {length} is over the model's max_seq_len {model.max_seq_len}")
    if training.global_batch_size % data_world:
        near = round(training.global_batch_size / data_world) * data_world or data_world
        wrong.append(
            f"training.global_batch_size {training.global_batch_size} cannot be split over {data_world} "
            f"data-parallel ranks; {near} could"
        )
    elif training.microbatch_size and (training.global_batch_size // data_world) % training.microbatch_size:
        rows = training.global_batch_size // data_world
        wrong.append(f"training.microbatch_size {training.microbatch_size} does not divide the {rows} rows of a rank")
    else:
        wrong += _wrong_microbatches(config, data_world)
    if config.checkpoint.huggingface:
        try:
            titan_model.config_to_huggingface(model)
        except ValueError as error:
            wrong.append(f"checkpoint.huggingface: {error}")
    if model.vocab_size < (needed := load_tokenizer(config.data).vocab_size):
        wrong.append(
            f"model.vocab_size {model.vocab_size} is less than the tokenizer's {needed}: "
            f"set model.vocab_size = {needed} (or more), or another data.tokenizer than {config.data.tokenizer!r}"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))


def _wrong_microbatches(config: Config, data_world: int) -> list[str]:
    """Return what is wrong with the number of microbatches for a pipeline, if anything."""
    rows, pipeline = config.training.global_batch_size // data_world, _options(config).pipeline
    try:
        check_pipeline(config.parallel.pp, pipeline, microbatches=rows // microbatch_size(config, data_world))
    except LayoutError as error:
        return [
            f"[parallel] {error} (a rank has {rows} rows of training.global_batch_size, in training.microbatch_size)"
        ]
    return []


def model_config(config: Config) -> DecoderConfig:
    """Return the decoder's shape: the preset, with what the settings change.

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
        return replace(shape, **changes)
    except KeyError as error:
        raise ConfigError(f"model.preset: {error.args[0]}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _checkpointer(config: Config, shape: DecoderConfig) -> Checkpointer:
    saving, folder = config.checkpoint, config.run.folder
    also = []
    if saving.huggingface:
        also.append(HuggingFaceExport(f"{folder}/huggingface", titan_model.huggingface_map(shape)))
    return Checkpointer(
        f"{folder}/checkpoints",
        keep_last=saving.keep_last,
        keep_every=saving.keep_every,
        keep_best=KeepBest("loss", count=saving.keep_best) if saving.keep_best else None,
        asynchronous=saving.asynchronous,
        on_save_error=saving.on_error,
        also=also,
    )


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def assemble(config: Config, process: Process) -> Run:
    """Build everything, on this process's device, at step 0.

    Args:
        config: Settings that passed `check`.
        process: This process.

    Returns:
        The run.

    Raises:
        ConfigError: If the data cannot be had, or this device cannot do what `[parallel]` asks for.
    """
    shape = model_config(config)
    mesh = build_mesh(_degrees(config), process.device.type)
    try:
        model = parallelize(titan_model.build(shape), mesh, titan_model.parallel_plan(shape), _options(config))
    except LayoutError as error:  # what only this process's device can tell
        raise ConfigError(f"[parallel] {error}") from None
    share_sequences(model.parts, mesh["cp"])
    model.materialize(process.device)
    titan_model.init_parameters(model.named_parameters(), shape, config.run.seed)

    place = data_axis(mesh)
    tokenizer = load_tokenizer(config.data)
    return Run(
        config=config,
        process=process,
        model_config=shape,
        model=model,
        place=place,
        microbatch_size=microbatch_size(config, place.world),
        optimizer=Optimizer(model.named_parameters(), config.optimizer),
        tokenizer=tokenizer,
        loader=open_loader(config, tokenizer, place, pin_memory=process.device.type == "cuda"),
        checkpointer=_checkpointer(config, shape),
        progress=Progress(),
    )


def share_sequences(parts: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Tell a model's parts that the ranks of the context-parallel `mesh` hold parts of the same sequences."""
    if mesh.size() > 1:
        for part in parts:
            titan_model.set_sequence_sum(part, partial(_sum_over, mesh.get_group()))


def _sum_over(group: ProcessGroup, values: Tensor) -> Tensor:
    total = values.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def microbatch_size(config: Config, data_world: int) -> int:
    """Return the rows of one forward on a rank, of `data_world` that read different rows."""
    rows = config.training.global_batch_size // data_world
    return config.training.microbatch_size or rows // choose_microbatches(
        _options(config).pipeline, config.parallel.pp, rows
    )


def _degrees(config: Config) -> Degrees:
    return Degrees(**{name: getattr(config.parallel, name) for name in MESH_DIMS})


def _options(config: Config) -> ParallelOptions:
    layout = config.parallel
    return ParallelOptions(
        param_dtype=torch.bfloat16 if config.training.dtype == "bfloat16" else None,
        reshard_after_forward=layout.reshard_after_forward,
        reduce_every_microbatch=layout.reduce_every_microbatch,
        cpu_offload=layout.cpu_offload,
        sequence_parallel=layout.sequence_parallel,
        async_tp=layout.async_tp,
        activation_checkpointing=layout.activation_checkpointing,
        checkpoint_every=layout.checkpoint_every,
        save_ops=layout.save_ops,
        memory_budget=layout.memory_budget,
        compile_blocks=layout.compile,
        compile_backend=layout.compile_backend,
        pipeline=PipelineOptions(
            schedule=layout.pipeline_schedule,
            stages_per_rank=layout.stages_per_rank,
            split=tuple(layout.pipeline_split),
            first_stage_less=layout.first_stage_less,
            last_stage_less=layout.last_stage_less,
        ),
        context=layout.context,
        float8=_float8(config),
    )


def _float8(config: Config) -> Float8Options | None:
    layout = config.parallel
    if layout.float8 == "none":
        return None
    return Float8Options(
        recipe=layout.float8,
        fsdp_all_gather=layout.float8_all_gather,
        skip=layout.float8_skip,
        emulate=layout.float8_emulate,
    )
