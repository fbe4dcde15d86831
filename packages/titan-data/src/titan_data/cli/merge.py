"""`titan-data merge`: join the parts of a corpus."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "merge",
        help="join the parts of a corpus that were prepared one by one",
        description="Join the parts that `titan-data prepare --out FOLDER --part i/n` made, so that FOLDER is opened "
        "like one that was prepared at once. No tokens are copied: the parts stay in their folders. The order of the "
        "documents, and so of training, is the same for any number of parts.",
    )
    parser.add_argument("path", type=Path, metavar="FOLDER", help="folder that contains the parts")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Join, and print what the corpus has."""
    from titan_data.shards.merge import merge_shards

    manifest = merge_shards(options.path)
    shards = len(manifest.shards)
    print(f"{options.path}: {manifest.documents:,} documents, {manifest.tokens:,} tokens in {shards:,} shards")
    return 0
