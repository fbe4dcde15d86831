"""From checked settings to the parts of a run. Here and in `titan_train.check` the five packages meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

import titan_data
import titan_model
from titan_ckpt import Checkpointer, HuggingFaceExport, KeepBest
from titan_model import DecoderConfig
from titan_parallel import DataAxis, LayoutError, ParallelModel, build_mesh, data_axis, parallelize
from titan_train.check import Checked
from titan_train.config import Config
from titan_train.config.parallel import with_keys
from titan_train.data import DataState, open_loader
from titan_train.distributed import Process
from titan_train.errors import ConfigError
from titan_train.interfaces import BatchLoader
from titan_train.optimizer import Optimizer


class Progress:
    """How far the run has come."""

    def __init__(self) -> None:
        self.step = 0
        self.tokens = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"step": self.step, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the counts."""
        self.step, self.tokens = state["step"], state["tokens"]


@dataclass(frozen=True)
class Run:
    """The parts of a run, ready to train.

    Attributes:
        config: The settings.
        process: This process.
        model_config: The decoder's shape.
        model: The decoder, laid out over the mesh.
        place: The part of each batch that this process reads.
        microbatch_size: Sequences of one forward pass on this process.
        optimizer: The optimizer of this process's parameters.
        tokenizer: The tokenizer of the data.
        loader: Batches, from the run's position on.
        checkpointer: Saves and loads `state()`.
        progress: Steps and tokens trained.
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
        """Return everything that a checkpoint holds, by name."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "data": DataState(self.loader, self.config.data.allow_changes),
            "progress": self.progress,
        }


def assemble(checked: Checked, process: Process) -> Run:
    """Build the parts of a run on this process's device, at step 0.

    Args:
        checked: Settings from `titan_train.check.check`.
        process: This process.

    Returns:
        The run.

    Raises:
        ConfigError: If the data cannot be read, or this device does not support what `[parallel]` asks for.
    """
    config, shape = checked.config, checked.model_config
    mesh = build_mesh(checked.degrees, process.device.type)
    try:
        model = parallelize(titan_model.build(shape, "meta"), mesh, checked.plan, checked.options)
    except LayoutError as error:  # what depends on this process's device
        raise ConfigError(f"[parallel] {with_keys(str(error))}") from None
    share_sequences(model.parts, mesh["cp"])
    model.materialize(process.device)
    titan_model.init_parameters(model.named_parameters(), shape, config.run.seed)

    place = data_axis(mesh)
    return Run(
        config=config,
        process=process,
        model_config=shape,
        model=model,
        place=place,
        microbatch_size=checked.microbatch_size,
        optimizer=Optimizer(model.named_parameters(), config.optimizer),
        tokenizer=checked.tokenizer,
        loader=open_loader(config, checked.tokenizer, place, pin_memory=process.device.type == "cuda"),
        checkpointer=_checkpointer(checked, process),
        progress=Progress(),
    )


def share_sequences(parts: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Make a model's parts sum over the context-parallel `mesh` what they count over sequences.

    The ranks of `mesh` hold parts of the same sequences; a router, for one, needs the load of full sequences.
    """
    if mesh.size() > 1:
        for part in parts:
            titan_model.set_sequence_sum(part, partial(_sum_over, mesh.get_group()))


def _sum_over(group: ProcessGroup, values: Tensor) -> Tensor:
    total = values.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _checkpointer(checked: Checked, process: Process) -> Checkpointer:
    config = checked.config
    saving, folder = config.checkpoint, config.run.folder
    exporters = [_huggingface_export(checked, process)] if saving.huggingface else []
    return Checkpointer(
        f"{folder}/checkpoints",
        keep_last=saving.keep_last,
        keep_every=saving.keep_every,
        keep_best=KeepBest("loss", count=saving.keep_best) if saving.keep_best else None,
        asynchronous=saving.asynchronous,
        on_save_error=saving.on_error,
        save_timeout=saving.save_timeout,
        exporters=exporters,
    )


def _huggingface_export(checked: Checked, process: Process) -> HuggingFaceExport:
    """Return the exporter of checkpoints, with the tokenizer that the run is trained with."""
    folder, tokenizer = Path(checked.config.run.folder), checked.tokenizer
    files: list[Path] = []
    if process.is_first:  # which also exports
        loaded_from = checked.config.data.tokenizer
        files = titan_data.export_tokenizer(tokenizer, folder / "tokenizer", loaded_from=loaded_from)
    weights = titan_model.huggingface_map(checked.model_config)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return HuggingFaceExport(
        folder / "huggingface",
        weights,
        config={**weights.config, **ends},
        extra_files=files,
    )
