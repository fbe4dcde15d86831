"""From the settings of [data] to a tokenizer, sources and a loader."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
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
    # The sources first: what is wrong with one of them is said with the key that it belongs to.
    sources = [_weighted(source, number, tokenizer) for number, source in enumerate(data.sources, start=1)]
    try:
        return titan_data.Loader(
            sources or [Weighted(_open(data, None, "data", tokenizer), max_epochs=data.max_epochs)],
            tokenizer,
            seq_len=config.training.seq_len,
            global_batch_size=config.training.global_batch_size,
            seed=config.run.seed,
            shuffle=data.shuffle,
            packing=Packing(data.packing, long_documents=data.long_documents, look_ahead=data.look_ahead),
            stages=[Stage(stage.from_step, stage.weights, stage.seq_len) for stage in data.stages],
            rank=place.rank,
            world=place.world,
            prefetch=data.prefetch,
            workers=data.workers,
            share_folder=_share_folder(config) if data.share_tokenizing else None,
            pin_memory=pin_memory,
        )
    except DataError as error:
        raise ConfigError(f"[data] {error}") from None


def _share_folder(config: Config) -> Path | None:
    """Name a folder of this run on this machine's own disk, where several ranks are on it."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return None
    run = sha256(os.path.abspath(config.run.folder).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"titan-data-{user}-{run}"


def sequence_lengths(config: Config) -> dict[str, int]:
    """Return every number of tokens per sequence that the run will come to, by the key that asks for it."""
    lengths = {"training.seq_len": config.training.seq_len}
    for number, stage in enumerate(config.data.stages, start=1):
        if stage.seq_len is not None:
            lengths[f"data.stages, table {number}: seq_len"] = stage.seq_len
    return lengths


def _weighted(source: MixedSection, number: int, tokenizer: titan_data.Tokenizer) -> Weighted:
    opened = _open(source, source.name, f"data.sources, table {number}", tokenizer)
    return Weighted(opened, source.weight, source.max_epochs, source.at_end)


def _open(source: SourceSection, name: str | None, where: str, tokenizer: titan_data.Tokenizer) -> titan_data.Source:
    try:
        match source.source:
            case "stdlib":
                return titan_data.StdlibSource(name or "stdlib")
            case "files":
                return _open_files(source, name)
            case "huggingface":
                return _open_huggingface(source, name)
            case "shards":
                return titan_data.TokenShards(str(source.path), name=name)
            case "megatron":
                return titan_data.MegatronTokens(str(source.path), name=name)
            case "raw":
                assert source.dtype is not None
                return titan_data.RawTokens(
                    source.files, dtype=source.dtype, eos_id=source.eos_id, vocab_size=tokenizer.vocab_size, name=name
                )
    except DataError as error:
        raise ConfigError(f"{where}, source {source.source!r}: {error}") from None


def _open_files(source: SourceSection, name: str | None) -> titan_data.Source:
    return titan_data.load_files(
        source.files,
        text_key=source.text_key,
        format=source.format,
        text_unit=source.text_unit,
        streaming=source.streaming,
        on_malformed=source.on_malformed,
        name=name,
        storage_options=source.storage_options,
        index_folder=source.index_folder,
    )


def _open_huggingface(source: SourceSection, name: str | None) -> titan_data.Source:
    assert source.path is not None
    return titan_data.load_huggingface(
        source.path,
        name=source.subset,
        split=source.split,
        data_files=source.files or None,
        text_key=source.text_key,
        streaming=source.streaming,
        source_name=name,
    )
