"""`titan-data inspect`: counts, lengths and samples of token shards or another file of tokens."""

import argparse
import random
from typing import Any

from titan_data.cli._numbers import count
from titan_data.cli._token_arguments import add_token_arguments, open_tokens
from titan_data.cli._tokenizer_arguments import add_tokenizer_arguments, open_tokenizer
from titan_data.errors import DataError

_SHOWN_TOKENS = 200  # tokens printed of each sample


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="show counts, lengths and samples of tokens",
        description="Show the number of documents and tokens, a histogram of document lengths, and sample documents.",
    )
    add_token_arguments(parser)
    add_tokenizer_arguments(
        parser, "show samples as text, decoded with this tokenizer (it must have made the tokens)", required=False
    )
    parser.add_argument("--samples", type=count, default=3, metavar="N", help="number of sample documents (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed that selects the samples (default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print statistics and samples."""
    from titan_data.shards.statistics import count_lengths

    source = open_tokens(options)
    tokenizer = None if options.tokenizer is None else open_tokenizer(options)
    made_by = source.tokenizer_fingerprint
    if tokenizer is not None and made_by is not None and tokenizer.fingerprint != made_by:
        raise DataError(f"these tokens were made by tokenizer {made_by}, not by {tokenizer.fingerprint}")
    found = count_lengths(source)
    print(f"{source.name}: {found.documents:,} documents, {found.tokens:,} tokens, tokenizer {made_by or 'unknown'}")
    if (with_tokens := found.documents - found.empty) > 0:
        mean = found.tokens / with_tokens
        print(f"tokens per document: {found.shortest:,} to {found.longest:,}, {mean:,.1f} on average")
    if found.empty:
        print(f"empty documents: {found.empty:,}")
    _draw(found.counts)
    chosen = random.Random(options.seed).sample(range(len(source)), min(options.samples, len(source)))
    for number in sorted(chosen):
        ids = source[number].tolist()
        more = f", the first {_SHOWN_TOKENS}" if len(ids) > _SHOWN_TOKENS else ""
        print(f"\ndocument {number:,} ({len(ids):,} tokens{more}):")
        print(ids[:_SHOWN_TOKENS] if tokenizer is None else tokenizer.decode(ids[:_SHOWN_TOKENS]))
    return 0


def _draw(counts: tuple[int, ...]) -> None:
    """Print a histogram with a bar per power of two."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    first = next((k for k, documents in enumerate(counts) if documents), 0)
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column(width=40)
    for k, documents in enumerate(counts[first:], start=first):
        table.add_row(f"{1 << k:,} to {(2 << k) - 1:,}", f"{documents:,}", Bar(max(counts), 0, documents, width=40))
    Console().print(table)
