"""`titan-data verify`: whether token shards are as they were written."""

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
        description="Read token shards in full and check all sums. Every damaged file is named, one per line, on "
        "standard output. Exit code 0: no damage; 1: damage, or no token shards there; 2: wrong command line.",
    )
    parser.add_argument("path", type=Path, help="a folder of token shards")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: one per core)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from titan_data.shards.verify import verify

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("verify", total=None)
        damages = verify(
            options.path,
            workers=options.workers,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for damage in damages:
        print(f"{options.path / damage.file}: {damage.what}")
    if damages:
        print(f"titan-data: {len(damages)} damaged; prepare them again, or copy them anew", file=sys.stderr)
        return 1
    print(f"{options.path}: no damage")
    return 0
