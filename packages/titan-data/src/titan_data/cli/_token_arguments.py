"""Ready-made tokens on the command line."""

import argparse
from pathlib import Path

from titan_data.cli._numbers import count, positive
from titan_data.errors import DataError
from titan_data.sources.base import TokenSource


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where the tokens are."""
    parser.add_argument(
        "path",
        type=Path,
        help="a folder of token shards; an .idx or .bin file of a Megatron-LM dataset; or a .bin file of bare ids "
        "(nanoGPT, llm.c)",
    )
    group = parser.add_argument_group("about a file of bare ids")
    group.add_argument("--dtype", choices=("uint16", "uint32"), help="type of the ids")
    group.add_argument("--eos-id", type=count, metavar="ID", help="the id that ends each document")
    group.add_argument("--vocab-size", type=positive, metavar="N", help="to make sure that all ids are below it")


def open_tokens(options: argparse.Namespace) -> TokenSource:
    """Open what the command line names."""
    path: Path = options.path.expanduser()
    if path.is_dir() or path.suffix not in (".bin", ".idx"):
        from titan_data.shards.dataset import TokenShards

        return TokenShards(path)
    if path.suffix == ".idx" or path.with_suffix(".idx").exists():
        from titan_data.shards.megatron import MegatronTokens

        return MegatronTokens(path)
    if options.dtype is None:
        raise DataError(f"{path} has no index beside it, so it is bare ids: say of which --dtype, and the --eos-id")
    from titan_data.shards.raw import RawTokens

    return RawTokens(path, dtype=options.dtype, eos_id=options.eos_id, vocab_size=options.vocab_size)
