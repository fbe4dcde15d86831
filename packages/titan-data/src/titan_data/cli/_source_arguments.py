"""Sources of text on the command line."""

import argparse
from collections.abc import Iterator
from itertools import islice

from titan_data.errors import DataError
from titan_data.sources.base import RandomAccessSource, StreamSource

_ONE_FILE_EACH = 1 << 30  # shards of a stream: as many as files, so that their order is kept


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where the text is."""
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="where the text is: files or globs or URLs of JSON lines, Parquet or text (also .gz and .zst); "
        "hf:NAME or hf:NAME:CONFIG for a Hugging Face dataset; "
        "stdlib for the source files of Python's standard library",
    )
    group = parser.add_argument_group("about the source")
    group.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    group.add_argument(
        "--format",
        choices=("jsonl", "parquet", "text"),
        help="of files whose names do not tell (default: by the suffix)",
    )
    group.add_argument(
        "--text-unit",
        choices=("file", "line", "paragraph"),
        default="file",
        help="what one document of a text file is (default: file)",
    )
    group.add_argument("--split", default="train", help="of a Hugging Face dataset (default: train)")
    group.add_argument("--revision", help="commit or tag of a Hugging Face dataset")
    group.add_argument(
        "--streaming", action="store_true", help="read a Hugging Face dataset as it comes, without a copy on disk"
    )
    group.add_argument(
        "--on-malformed",
        choices=("skip", "raise"),
        default="skip",
        help="malformed records become empty documents and are counted, or stop the command (default: skip)",
    )


def open_source(options: argparse.Namespace) -> RandomAccessSource | StreamSource:
    """Open what the command line names."""
    words: list[str] = options.source
    special = [word for word in words if word == "stdlib" or word.startswith("hf:")]
    if not special:
        from titan_data.files.load import load_files

        return load_files(
            words,
            text_key=options.text_key,
            format=options.format,
            text_unit=options.text_unit,
            streaming=True,
            shards=_ONE_FILE_EACH,
            on_malformed=options.on_malformed,
        )
    if len(words) > 1:
        raise DataError(f"{special[0]} is a source by itself: run the command once for each source")
    if special == ["stdlib"]:
        from titan_data.sources.stdlib import StdlibSource

        return StdlibSource()
    from titan_data.sources.huggingface import load_huggingface

    name, _, config = words[0].removeprefix("hf:").partition(":")
    return load_huggingface(
        name,
        name=config or None,
        split=options.split,
        text_key=options.text_key,
        streaming=options.streaming or None,  # some are too large for anything but streaming
        shards=_ONE_FILE_EACH,
        revision=options.revision,
    )


def read_texts(source: RandomAccessSource | StreamSource, documents: int | None) -> Iterator[str]:
    """Read the first documents of a source, or all."""
    return islice(_all_texts(source), documents)


def _all_texts(source: RandomAccessSource | StreamSource) -> Iterator[str]:
    if isinstance(source, RandomAccessSource):
        yield from (source[i] for i in range(len(source)))
    else:
        for shard in range(source.shards):
            yield from source.iterate(shard, 0)
