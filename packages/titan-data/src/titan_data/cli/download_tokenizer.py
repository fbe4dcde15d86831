"""`titan-data download-tokenizer`: a tokenizer from the Hugging Face Hub."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "download-tokenizer",
        help="fetch a tokenizer from the Hugging Face Hub",
        description="Fetch a tokenizer's files. Run again after a failure: what is there is not fetched again.",
    )
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="such as meta-llama/Meta-Llama-3-8B")
    parser.add_argument("--subfolder", metavar="FOLDER", help="folder in the repository, such as original")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument(
        "--hf-token", metavar="TOKEN", help="of an account with access (default: HF_TOKEN, or of `hf auth login`)"
    )
    parser.add_argument("--out", type=Path, default=Path("tokenizer"), metavar="FOLDER", help="default: tokenizer")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fetch, and make sure that it is a tokenizer."""
    from titan_data.tokenizers.download import download_tokenizer
    from titan_data.tokenizers.load import load_tokenizer

    path = download_tokenizer(
        options.repo_id,
        options.out,
        subfolder=options.subfolder,
        revision=options.revision,
        token=options.hf_token,
    )
    tokenizer = load_tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint}")
    return 0
