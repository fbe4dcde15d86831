"""From the settings of [data] to a tokenizer, sources and a loader."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import titan_data
from titan_data import ChangedDataError, DataError, Packing, Stage, Weighted
from titan_parallel import DataAxis
from titan_train.config import Config, DataSection, MixedSection, SourceSection
from titan_train.errors import ConfigError, TrainingError
from titan_train.seams import BatchLoader
from titan_train.settings import shown


@dataclass(frozen=True)
class DataState:
    """The loader's place as checkpoints keep it, with what may have changed since then."""

    loader: BatchLoader
    allow_changes: Collection[str]

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's place."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place.

        Raises:
            TrainingError: If data or settings are others than those of the run, and that is not allowed.
        """
        try:
            self.loader.load_state_dict(state, allow_changes=self.allow_changes)
        except ChangedDataError as error:
            allowed = shown(sorted({*self.allow_changes, *error.changes}))
            raise TrainingError(f"{error}\nas a flag of this command: --data.allow_changes '{allowed}'") from None


def load_tokenizer(data: DataSection) -> titan_data.Tokenizer:
    """Load the tokenizer that is asked for.

    Raises:
        ConfigError: If it cannot be had.
    """
    try:
        return titan_data.load_tokenizer(data.tokenizer)
    except DataError as error:
        raise ConfigError(f"data.tokenizer: {error}") from None


def open_loader(
    config: Config, tokenizer: titan_data.Tokenizer, place: DataAxis, *, pin_memory: bool
) -> titan_data.Loader:
    """Open the sources and lay the loader over them, at the beginning.

    Args:
        config: The settings.
        tokenizer: For the sources of text.
        place: Which of the rows are wanted here.
        pin_memory: Whether batches go on to a GPU.

    Raises:
        ConfigError: If the data cannot be had.
    """
    data = config.data
    try:
        return titan_data.Loader(
            [_weighted(source) for source in data.sources] or [Weighted(_open(data), max_epochs=data.max_epochs)],
            tokenizer,
            seq_len=config.training.seq_len,
            global_batch_size=config.training.global_batch_size,
            seed=config.run.seed,
            shuffle=data.shuffle,
            packing=Packing(data.packing, look_ahead=data.look_ahead),
            stages=[Stage(stage.from_step, stage.weights) for stage in data.stages],
            rank=place.rank,
            world=place.world,
            prefetch=data.prefetch,
            workers=data.workers,
            pin_memory=pin_memory,
        )
    except DataError as error:
        raise ConfigError(f"[data] {error}") from None


def _weighted(source: MixedSection) -> Weighted:
    return Weighted(_open(source, source.name), source.weight, source.max_epochs, source.at_end)


def _open(source: SourceSection, name: str | None = None) -> titan_data.Source:
    if source.source == "stdlib":
        return titan_data.StdlibSource(name or "stdlib")
    if source.source == "files":
        return titan_data.load_files(
            source.files,
            text_key=source.text_key,
            text_unit=source.text_unit,
            streaming=source.streaming,
            on_malformed=source.on_malformed,
            name=name,
        )
    assert source.path is not None
    if source.source == "shards":
        return titan_data.TokenShards(source.path, name=name)
    return titan_data.load_huggingface(
        source.path,
        name=source.subset,
        split=source.split,
        data_files=source.files or None,
        text_key=source.text_key,
        streaming=source.streaming,
        source_name=name,
    )
