"""Arguments that name a tokenizer and its bos and eos, and loading it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_data.tokenizers.base import Tokenizer


def add_tokenizer_arguments(parser: argparse.ArgumentParser, help: str, *, required: bool) -> None:
    """Add the arguments; `help` says what the tokenizer is for."""
    parser.add_argument("--tokenizer", required=required, metavar="PATH", help=help)
    group = parser.add_argument_group("tokenizer options")
    for kind, where in (("bos", "before"), ("eos", "after")):
        group.add_argument(
            f"--{kind}",
            default="auto",
            metavar="TOKEN",
            help=f"name of the token {where} each document; none for no token (default: as the tokenizer's files say)",
        )
    group.add_argument(
        "--encoding",
        metavar="NAME",
        help="what belongs to a file of tiktoken ranks: gpt2, cl100k_base, o200k_base, llama3 or qwen (default: the "
        "published files are recognized)",
    )
    group.add_argument(
        "--match-added-tokens",
        action="store_true",
        help="find added tokens that are not special in the text, as transformers does (default: they are plain text)",
    )


def open_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Load the tokenizer that the arguments name."""
    from titan_data.tokenizers.load import load_tokenizer

    return load_tokenizer(
        options.tokenizer,
        bos=None if options.bos == "none" else options.bos,
        eos=None if options.eos == "none" else options.eos,
        match_added_tokens=options.match_added_tokens,
        encoding=options.encoding,
    )
