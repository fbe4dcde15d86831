"""`titan-data download-tokenizer`: download a tokenizer from the Hugging Face Hub."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "download-tokenizer",
        help="download a tokenizer from the Hugging Face Hub",
        description="Download a tokenizer's files. After a failure, run it again: finished files are kept.",
    )
    parser.add_argument(
        "--repo-id",
        required=True,
        metavar="OWNER/NAME",
        help="repository on the Hub, such as meta-llama/Meta-Llama-3-8B",
    )
    parser.add_argument(
        "--subfolder", metavar="FOLDER", help="folder in the repository, such as original (default: its root)"
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument(
        "--hf-token",
        metavar="TOKEN",
        help="access token of a Hugging Face account (default: HF_TOKEN, or that of `hf auth login`)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tokenizer"),
        metavar="FOLDER",
        help="folder for the files (default: tokenizer)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Download, and check that it is a tokenizer."""
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
