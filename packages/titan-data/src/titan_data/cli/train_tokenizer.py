"""`titan-data train-tokenizer`: train a small tokenizer on any text, offline."""

import argparse
from pathlib import Path
from typing import Any

from titan_data.cli._numbers import positive
from titan_data.cli._source_arguments import add_source_arguments, open_source, read_texts
from titan_data.errors import DataError


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "train-tokenizer",
        help="train a small BPE or SentencePiece tokenizer",
        description="Train a tokenizer. The same text always gives the same file.",
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--kind",
        required=True,
        choices=("bpe", "sentencepiece"),
        help="bpe: tiktoken ranks with Llama 3's split pattern; sentencepiece: a model with Llama 2's settings",
    )
    parser.add_argument(
        "--vocab-size", required=True, type=positive, metavar="N", help="number of ids, including special tokens"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument(
        "--max-documents", type=positive, metavar="N", help="train on the first N documents only (default: all)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, and write the file."""
    from titan_data.shards.writer import explain_full_disk, write_atomically
    from titan_data.tokenizers.load import load_tokenizer
    from titan_data.tokenizers.train import train_tokenizer

    out: Path = options.out.expanduser()
    if out.exists():
        raise DataError(f"{out} already exists: remove it, or choose another --out")
    texts = read_texts(open_source(options), options.max_documents)
    data = train_tokenizer(texts, kind=options.kind, vocab_size=options.vocab_size)
    with explain_full_disk(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, data)
    tokenizer = load_tokenizer(out, encoding="llama3" if options.kind == "bpe" else None)
    print(f"{out}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint}")
    return 0
