"""Arguments that name a source of text, and opening it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from titan_data.errors import DataError

if TYPE_CHECKING:
    from titan_data.sources.base import RandomAccessSource, StreamSource

_ONE_FILE_EACH = 1 << 30  # shards of a stream: one per file, which keeps the order of the files


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="source of the text: files, globs or URLs of JSON lines, Parquet or text (also .gz and .zst); "
        "hf:NAME or hf:NAME:CONFIG for a Hugging Face dataset; "
        "stdlib for the source files of Python's standard library",
    )
    group = parser.add_argument_group("source options")
    group.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="JSON key or Parquet column of the text, as a path if it is nested, such as meta.text (default: text)",
    )
    group.add_argument(
        "--format",
        choices=("jsonl", "parquet", "text"),
        help="format of the files (default: inferred from their suffix)",
    )
    group.add_argument(
        "--text-unit",
        choices=("file", "line", "paragraph"),
        default="file",
        help="what counts as one document in text files (default: file)",
    )
    group.add_argument("--split", default="train", help="split of a Hugging Face dataset (default: train)")
    group.add_argument("--revision", help="commit or tag of a Hugging Face dataset")
    group.add_argument(
        "--streaming", action="store_true", help="stream a Hugging Face dataset instead of downloading it first"
    )
    group.add_argument(
        "--on-malformed",
        choices=("skip", "raise"),
        default="skip",
        help="skip: malformed records become empty documents and are counted; raise: stop at the first (default: skip)",
    )
    group.add_argument(
        "--on-unreadable-file",
        choices=("skip", "raise"),
        default="raise",
        help="raise: stop if a file cannot be read, or not to its end; skip: continue without what is lost, and list "
        "it (default: raise)",
    )


def open_source(options: argparse.Namespace) -> RandomAccessSource | StreamSource:
    """Open the source that the arguments name."""
    words: list[str] = options.source
    special = [word for word in words if word == "stdlib" or word.startswith("hf:")]
    if not special:
        from titan_data.files.load import load_files
        from titan_data.files.options import Parsing

        return load_files(
            words,
            text_key=options.text_key,
            streaming=True,
            shards=_ONE_FILE_EACH,
            parsing=Parsing(options.format, options.text_unit, options.on_malformed, options.on_unreadable_file),
        )
    if len(words) > 1:
        raise DataError(f"{special[0]} cannot be combined with other sources: run the command once for each source")
    if special == ["stdlib"]:
        from titan_data.sources.stdlib import StdlibSource

        return StdlibSource()
    from titan_data.sources.huggingface import HubOptions, load_huggingface_dataset

    name, _, config = words[0].removeprefix("hf:").partition(":")
    return load_huggingface_dataset(
        name,
        config or None,
        split=options.split,
        text_key=options.text_key,
        streaming=options.streaming or None,  # None: some known datasets stream by default
        shards=_ONE_FILE_EACH,
        hub=HubOptions(revision=options.revision),
    )


def read_texts(source: RandomAccessSource | StreamSource, documents: int | None) -> Iterator[str]:
    """Read the first documents of a source, or all if `documents` is None."""
    return islice(_all_texts(source), documents)


def _all_texts(source: RandomAccessSource | StreamSource) -> Iterator[str]:
    from titan_data.sources.base import RandomAccessSource

    if isinstance(source, RandomAccessSource):
        yield from (source[i] for i in range(len(source)))
    else:
        for shard in range(source.shards):
            yield from source.iterate(shard, 0)
