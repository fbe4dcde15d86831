"""From the settings of [data] to a tokenizer, sources and a loader of titan-data.

`titan_train.check` loads the tokenizer, `titan_train.assembly` opens the loader.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import titan_data
from titan_data import (
    ChangedDataError,
    DataError,
    Distribution,
    MixtureSource,
    Packing,
    Parsing,
    Phase,
    ReadAhead,
    StorageOptions,
)
from titan_parallel import DataAxis
from titan_train.config import Config
from titan_train.config.data import DataSection, MixtureEntry
from titan_train.config.sources import (
    FilesSource,
    HuggingFaceSource,
    MegatronSource,
    RawSource,
    ShardsSource,
    Source,
    StdlibSource,
)
from titan_train.errors import ConfigError, TrainingError
from titan_train.interfaces import BatchLoader
from titan_train.settings import shown


@dataclass(frozen=True)
class DataState:
    """The loader's position, as a checkpoint stores it.

    Attributes:
        loader: The loader.
        allow_changes: What may differ from the run that is resumed.
    """

    loader: BatchLoader
    allow_changes: Collection[str]

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            TrainingError: If data or settings differ from those of the saved run in what is not allowed.
        """
        try:
            self.loader.load_state_dict(state, allow_changes=self.allow_changes)
        except ChangedDataError as error:
            allowed = shown(sorted({*self.allow_changes, *error.changes}))
            raise TrainingError(f"{error}\nto accept this, add --data.allow_changes '{allowed}'") from None


def load_tokenizer(data: DataSection) -> titan_data.Tokenizer:
    """Load the tokenizer of `data.tokenizer`.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    try:
        return titan_data.load_tokenizer(
            data.tokenizer,
            bos=data.bos,
            eos=data.eos,
            match_added_tokens=data.match_added_tokens,
            encoding=data.encoding,
        )
    except DataError as error:
        raise ConfigError(f"data.tokenizer: {error}") from None


def open_loader(
    config: Config, tokenizer: titan_data.Tokenizer, place: DataAxis, *, pin_memory: bool
) -> titan_data.Loader:
    """Open the sources and a loader over them, at step 0.

    Args:
        config: The settings.
        tokenizer: Tokenizes the sources of text.
        place: The part of each batch that this rank reads.
        pin_memory: Whether to place batches in pinned memory, for a GPU.

    Raises:
        ConfigError: If the data cannot be read or a setting of `[data]` is invalid.
    """
    data = config.data
    # Each source is opened on its own, so that an error names the table that it belongs to.
    sources = [_mixture_source(entry, number, tokenizer) for number, entry in enumerate(data.sources, start=1)]
    if not sources:
        sources = [MixtureSource(_open(data.source, None, "data", tokenizer), max_epochs=data.source.max_epochs)]
    try:
        return titan_data.Loader(
            sources,
            tokenizer,
            seq_len=config.training.seq_len,
            global_batch_size=config.training.global_batch_size,
            seed=config.run.seed,
            shuffle=data.shuffle,
            packing=Packing(data.packing, long_documents=data.long_documents, packing_window=data.packing_window),
            phases=[Phase(phase.from_step, phase.weights, phase.seq_len) for phase in data.phases],
            distribution=Distribution(place.dp_rank, place.dp_world_size),
            read_ahead=ReadAhead(prefetch=data.prefetch, workers=data.workers, pin_memory=pin_memory),
            share_directory=_share_folder(config) if data.share_tokenizing else None,
        )
    except DataError as error:
        raise ConfigError(f"[data] {error}") from None


def _share_folder(config: Config) -> Path | None:
    """Return a folder on this machine's disk for tokens that its ranks share; None if it has only one rank."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return None
    run = sha256(str(Path(config.run.folder).resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"titan-data-{user}-{run}"


def sequence_lengths(config: Config) -> dict[str, int]:
    """Return every sequence length of the run, in tokens, by the key that sets it."""
    lengths = {"training.seq_len": config.training.seq_len}
    for number, phase in enumerate(config.data.phases, start=1):
        if phase.seq_len is not None:
            lengths[f"data.phases, table {number}: seq_len"] = phase.seq_len
    return lengths


def _mixture_source(entry: MixtureEntry, number: int, tokenizer: titan_data.Tokenizer) -> MixtureSource:
    source = _open(entry.source, entry.name, f"data.sources, table {number}", tokenizer)
    return MixtureSource(source, entry.weight, entry.source.max_epochs, entry.at_end)


def _open(source: Source, name: str | None, where: str, tokenizer: titan_data.Tokenizer) -> titan_data.Source:
    try:
        match source:
            case StdlibSource():
                return titan_data.StdlibSource(name or "stdlib")
            case FilesSource():
                return titan_data.load_files(
                    source.files,
                    text_key=source.text_key,
                    streaming=source.streaming,
                    name=name,
                    parsing=Parsing(source.format, source.text_unit, source.on_malformed, source.on_unreadable_file),
                    storage=StorageOptions(
                        filesystem=source.storage_options or {}, index_directory=source.index_directory
                    ),
                )
            case HuggingFaceSource():
                return titan_data.load_huggingface_dataset(
                    source.path,
                    source.subset,
                    split=source.split,
                    data_files=source.files or None,
                    text_key=source.text_key,
                    streaming=source.streaming,
                    source_name=name,
                )
            case ShardsSource():
                return titan_data.TokenShards(source.path, name=name, verify=source.verify)
            case MegatronSource():
                return titan_data.MegatronTokens(source.path, name=name)
            case RawSource():
                return titan_data.RawTokens(
                    source.files,
                    dtype=source.dtype,
                    eos_id=source.eos_id,
                    bos_id=source.bos_id,
                    vocab_size=tokenizer.vocab_size,
                    name=name,
                )
    except DataError as error:
        raise ConfigError(f"{where}, source {source.source!r}: {error}") from None
