"""`titan-data verify`: check that token shards are as they were written."""

import argparse
import sys
from pathlib import Path
from typing import Any

from titan_data.cli._numbers import positive


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "verify",
        help="check every byte of token shards",
        description="Read all files of token shards and check their checksums. Corrupt files are listed, one per line, "
        "on standard output. Exit code 0: all valid; 1: corrupt files, or no token shards; 2: invalid command line.",
    )
    parser.add_argument("path", type=Path, help="folder of token shards")
    parser.add_argument("--workers", type=positive, metavar="N", help="number of threads (default: one per core)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify, and show a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from titan_data.shards.verify import verify_shards

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("verify", total=None)
        corrupt = verify_shards(
            options.path,
            workers=options.workers,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for file in corrupt:
        print(f"{options.path / file.file}: {file.what}")
    if corrupt:
        print(f"titan-data: {len(corrupt)} corrupt files; prepare or copy them again", file=sys.stderr)
        return 1
    print(f"{options.path}: all files are valid")
    return 0
