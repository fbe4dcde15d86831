"""`Loader`, `load_files` and `load_huggingface_dataset` with the options of their groups as plain keywords.

So that a test can vary any of them without knowing which group it belongs to.
"""

from pathlib import Path
from typing import Any

from titan_data import (
    Distribution,
    HubOptions,
    Loader,
    Parsing,
    RandomAccessSource,
    ReadAhead,
    Source,
    StorageOptions,
    StreamSource,
    Tokenizer,
    load_files,
    load_huggingface_dataset,
)


def _take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def flat_loader(sources: Source | list[Any], tokenizer: Tokenizer | None, **options: Any) -> Loader:
    """Make a loader from the fields of `Distribution` and `ReadAhead`, and the rest of its arguments."""
    distribution = Distribution(**_take(options, "rank", "world_size"))
    read_ahead = ReadAhead(**_take(options, "prefetch", "workers", "patience", "pin_memory"))
    return Loader(sources, tokenizer, distribution=distribution, read_ahead=read_ahead, **options)


def flat_files(patterns: Any, **options: Any) -> Any:
    """Open files with the fields of `Parsing` and `StorageOptions`, and the rest of the arguments."""
    parsing = Parsing(**_take(options, "format", "text_unit", "on_malformed", "on_unreadable_file"))
    storage = StorageOptions(**_take(options, "filesystem", "retry", "index_directory", "cache_bytes"))
    return load_files(patterns, parsing=parsing, storage=storage, **options)


def flat_dataset(
    path: str, cache_directory: str | Path | None = None, **options: Any
) -> RandomAccessSource | StreamSource:
    """Open a dataset with the fields of `HubOptions`, and the rest of the arguments."""
    hub = HubOptions(cache_directory=cache_directory, **_take(options, "revision", "retry"))
    return load_huggingface_dataset(path, hub=hub, **options)
