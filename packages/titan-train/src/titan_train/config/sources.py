"""The kinds of text source: one small class each, told apart by `source`.

A source is written as keys of a table that also has keys of its own (`[data]`, or one of `[[data.sources]]`). Such a
table is a `SourceTable`: it collects the source's keys into one object of the kind's class, and writes them back flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from titan_train.config.section import Count, CountOrZero, Section, Text, Texts


class SourceSection(Section):
    """What all kinds of source have."""

    source: str
    max_epochs: Count | None = None
    """How many times each document is used at most; "none" repeats documents as long as the run needs."""


class StdlibSource(SourceSection):
    """The source code of Python's standard library: text that is on every machine."""

    source: Literal["stdlib"] = "stdlib"


class FilesSource(SourceSection):
    """JSON lines, Parquet or text files, on disk or remote."""

    source: Literal["files"] = "files"
    files: Texts
    """Paths, globs or URLs of the files."""
    format: Literal["jsonl", "parquet", "text"] | None = None
    """Format of the files; "none" decides by their names."""
    text_key: str = "text"
    """Key or column that holds the text; a path for nested ones, such as meta.text."""
    text_unit: Literal["file", "line", "paragraph"] = "file"
    """What one document is, in text files."""
    streaming: bool = False
    """Read documents one after another, without shuffling them."""
    on_malformed: Literal["skip", "raise"] = "skip"
    """Skip and count malformed records, or stop at the first one."""
    on_unreadable_file: Literal["skip", "raise"] = "skip"
    """Skip files that cannot be read, or not to their ends, with a warning that says what is lost, or stop."""
    index_directory: str | None = None
    """Folder that caches where each record begins, so that later starts need not scan the files; "none" scans."""
    storage_options: dict[str, str | int | float | bool] = {}
    """Arguments of fsspec's file system, such as {anon = true}. They are written to config.toml: no secrets."""


class HuggingFaceSource(SourceSection):
    """What `datasets.load_dataset` loads."""

    source: Literal["huggingface"] = "huggingface"
    path: Text
    """Name of a dataset on the Hugging Face Hub; or json, parquet or text, with `files`."""
    files: list[str] = []
    """Paths or URLs of data files, where path is json, parquet or text."""
    subset: str | None = None
    """Configuration of the dataset, such as a language."""
    split: str = "train"
    """Split of the dataset."""
    text_key: str = "text"
    """Key or column that holds the text."""
    streaming: bool = False
    """Read documents one after another, without shuffling them."""


class ShardsSource(SourceSection):
    """Token shards that `titan-data prepare` wrote."""

    source: Literal["shards"] = "shards"
    path: Text | Texts
    """Folder that `titan-data prepare` wrote, or several, whose documents follow one another."""
    verify: bool = False
    """Check the checksum of each shard when it is first read, which reads it completely."""


class RawSource(SourceSection):
    """Files of nothing but token ids, as nanoGPT and llm.c write them."""

    source: Literal["raw"] = "raw"
    files: Texts
    """Paths of the files, in order."""
    dtype: Literal["uint16", "uint32"]
    """Data type of the ids, uint16 or uint32."""
    eos_id: CountOrZero | None = None
    """Id that ends each document; "none": no id does. Without eos_id and bos_id, each file is one document."""
    bos_id: CountOrZero | None = None
    """Id that begins each document, as in files of llm.c and modded-nanogpt; "none": no id does."""


class MegatronSource(SourceSection):
    """An indexed dataset of Megatron-LM."""

    source: Literal["megatron"] = "megatron"
    path: Text
    """The .bin or the .idx file."""


SOURCES: Final[dict[str, type[SourceSection]]] = {
    "stdlib": StdlibSource,
    "files": FilesSource,
    "shards": ShardsSource,
    "huggingface": HuggingFaceSource,
    "raw": RawSource,
    "megatron": MegatronSource,
}
Source = Annotated[
    StdlibSource | FilesSource | ShardsSource | HuggingFaceSource | RawSource | MegatronSource,
    Field(discriminator="source"),
]


class SourceTable(Section):
    """A table with the keys of one source beside its own. Keys that are not its own are the source's."""

    source: Source = StdlibSource()

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or isinstance(values.get("source"), SourceSection):
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields and key != "source"}
        of_source = {key: value for key, value in values.items() if key not in own}
        return own | ({"source": {"source": "stdlib", **of_source}} if of_source else {})

    @model_serializer(mode="wrap")
    def _flatten(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        source: dict[str, Any] = values.pop("source")
        return {**source, **values}


def kinds_with(key: str) -> list[str]:
    """Return the kinds of source that have a setting `key`."""
    return [kind for kind, table in SOURCES.items() if key in table.model_fields]


def replace_kind(table: dict[str, Any], kind: str) -> list[str]:
    """Give a table as read from a file another kind of source, without the keys that this kind does not have.

    Args:
        table: Changed in place.
        kind: The other kind.

    Returns:
        The keys that were removed.
    """
    removed = [key for key in table if kinds_with(key) and kind in SOURCES and key not in SOURCES[kind].model_fields]
    for key in removed:
        del table[key]
    table["source"] = kind
    return removed
