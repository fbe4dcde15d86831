"""Arguments that name a source of tokens, and opening it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from titan_data.cli._numbers import count, positive
from titan_data.errors import DataError

if TYPE_CHECKING:
    from titan_data.sources.base import TokenSource


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "path",
        type=Path,
        help="a folder of token shards; an .idx or .bin file of a Megatron-LM dataset; or a .bin file of raw ids "
        "(nanoGPT, llm.c)",
    )
    group = parser.add_argument_group("options of raw ids")
    group.add_argument("--dtype", choices=("uint16", "uint32"), help="integer type of the ids")
    group.add_argument(
        "--eos-id", type=count, metavar="ID", help="id that ends each document (default: each file is one document)"
    )
    group.add_argument(
        "--bos-id", type=count, metavar="ID", help="id that begins each document, as in files of llm.c (default: none)"
    )
    group.add_argument("--vocab-size", type=positive, metavar="N", help="check that all ids are below N")


def open_tokens(options: argparse.Namespace) -> TokenSource:
    """Open the source that the arguments name."""
    path: Path = options.path.expanduser()
    if path.is_dir() or path.suffix not in (".bin", ".idx"):
        from titan_data.shards.dataset import TokenShards

        return TokenShards(path)
    if path.suffix == ".idx" or path.with_suffix(".idx").exists():
        from titan_data.shards.megatron import MegatronTokens

        return MegatronTokens(path)
    if options.dtype is None:
        raise DataError(
            f"{path} has no .idx file next to it, so it contains raw ids: set --dtype, and --eos-id or --bos-id"
        )
    from titan_data.shards.raw import RawTokens

    return RawTokens(
        path, dtype=options.dtype, eos_id=options.eos_id, bos_id=options.bos_id, vocab_size=options.vocab_size
    )
