"""`titan-data prepare`: tokenize text into token shards."""

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from titan_data.cli._numbers import count, positive
from titan_data.cli._part_argument import HELP, parse_part
from titan_data.cli._source_arguments import add_source_arguments, open_source
from titan_data.cli._tokenizer_arguments import add_tokenizer_arguments, open_tokenizer
from titan_data.errors import DataError


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "prepare",
        help="tokenize text into token shards",
        description="Tokenize text into a folder of token shards, which training memory-maps. After any interruption, "
        "repeat the command: it resumes, and writes the same files as an uninterrupted run.",
    )
    add_source_arguments(parser)
    add_tokenizer_arguments(parser, "file or folder of the tokenizer, or 'bytes'", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder for the shards")
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="worker processes; 0 to tokenize in the main process (default: one per core)",
    )
    parser.add_argument(
        "--shard-tokens", type=positive, metavar="N", help="maximum number of tokens per shard (default: 268,435,456)"
    )
    parser.add_argument("--part", metavar="i/n", help=HELP)
    parser.add_argument(
        "--checksum",
        action="store_true",
        help="record checksums of the input files, for which each is read once more, so that a repeated command tells "
        "files that were only copied from edited ones (default: sizes and times of modification)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prepare, and show a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from titan_data.shards import prepare as engine
    from titan_data.shards.dataset import TokenShards
    from titan_data.shards.statistics import count_lengths

    part = None if options.part is None else parse_part(options.part, os.environ)
    tokenizer = open_tokenizer(options)
    source = open_source(options)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar, _interrupted_between_batches() as check_interrupt:
        task = bar.add_task("prepare", total=None, what="starting")

        def report(progress: engine.Progress) -> None:
            check_interrupt()
            seconds = bar.tasks[0].elapsed or 1e-9
            what = (
                f"{progress.documents:,} documents, {progress.tokens:,} tokens, {progress.shards} shards, "
                f"{progress.new_tokens / seconds:,.0f} tokens/s"
            )
            bar.update(task, completed=progress.done, total=progress.total, what=what)

        engine.prepare(
            source,
            tokenizer,
            options.out,
            workers=options.workers,
            shard_tokens=options.shard_tokens or engine.SHARD_TOKENS,
            part=part,
            checksum=options.checksum,
            report=report,
        )
    out = options.out if part is None else options.out / part.folder_name
    found = count_lengths(TokenShards(out))
    if found.tokens == 0 and (part is None or found.documents > 0):
        raise DataError(
            f"source {source.name!r} has no text in any of its {found.documents:,} documents: check its files and "
            f"--text-key, and remove {out} before running the command again"
        )
    print(f"{out}: {found.documents:,} documents, {found.tokens:,} tokens")
    if found.empty:
        print(f"{found.empty:,} of the documents are empty (no text, or malformed)")
    if malformed := getattr(source, "malformed", 0):
        print(f"{malformed:,} malformed records were found in this run")
    for file in getattr(source, "unreadable", ()):
        print(f"unreadable: {file}")
    return 0


@contextlib.contextmanager
def _interrupted_between_batches() -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C until the yielded function is called; a second Ctrl-C stops at once.

    Python would raise KeyboardInterrupt at any instruction: while the bar is drawn, or in a destructor, where it is
    lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = threading.Event()

    def remember(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield check
        check()  # for a Ctrl-C after the last batch
    finally:
        signal.signal(signal.SIGINT, before)
