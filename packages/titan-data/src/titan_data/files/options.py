"""Option groups of `load_files`: how records are parsed, and how storage is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from titan_data.errors import DataError
from titan_data.files.malformed import OnMalformed, OnUnreadableFile
from titan_data.files.retry import Retry

Format = Literal["jsonl", "parquet", "text"]
TextUnit = Literal["file", "line", "paragraph"]


@dataclass(frozen=True)
class Parsing:
    """How files are split into records and records become documents.

    Attributes:
        format: "jsonl", "parquet" or "text"; None to infer it from the suffix of the files.
        text_unit: What one document of a text file is: the complete "file", each "line", or each "paragraph" (the lines
            between blank ones).
        on_malformed: "skip" to warn about malformed records, by file and line, and to count them; "raise" to stop.
        on_unreadable_file: "skip" to warn about files that cannot be read, or not to their ends (corrupt data, no
            `text_key`), and to list them with the number of rows or bytes that are lost; "raise" to stop.

    Raises:
        DataError: If a value is not one of those above.
    """

    format: Format | None = None
    text_unit: TextUnit = "file"
    on_malformed: OnMalformed = "skip"
    on_unreadable_file: OnUnreadableFile = "skip"

    def __post_init__(self) -> None:
        if self.format not in (None, "jsonl", "parquet", "text"):
            raise DataError(f'format must be "jsonl", "parquet" or "text", not {self.format!r}')
        if self.text_unit not in ("file", "line", "paragraph"):
            raise DataError(f'text_unit must be "file", "line" or "paragraph", not {self.text_unit!r}')
        if self.on_malformed not in ("skip", "raise"):
            raise DataError(f'on_malformed must be "skip" or "raise", not {self.on_malformed!r}')
        if self.on_unreadable_file not in ("skip", "raise"):
            raise DataError(f'on_unreadable_file must be "skip" or "raise", not {self.on_unreadable_file!r}')


@dataclass(frozen=True)
class StorageOptions:
    """How storage is read.

    Attributes:
        filesystem: Arguments of fsspec's file system, such as credentials.
        retry: How often to retry, and how long to wait, when storage fails.
        index_directory: A directory to keep indices in, so that a later start need not scan the files again. For a
            stream it keeps the number of records of each file, so that a resume skips complete .gz and .zst files.
        cache_bytes: Size of the cache of decoded Parquet row groups, in bytes.
    """

    filesystem: Mapping[str, Any] = field(default_factory=dict, repr=False)
    retry: Retry = field(default_factory=Retry)
    index_directory: str | Path | None = None
    cache_bytes: int = 256 << 20
