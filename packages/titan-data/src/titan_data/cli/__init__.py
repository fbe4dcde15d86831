"""The command line `titan-data COMMAND ...`: a module for each command; arguments that several share are in `_*.py`.

A command imports what it needs when it runs: `--help` takes a quarter of a second, importing everything several.
Called by the script `titan-data` and by `python -m titan_data`.
Hands on to `load_files`, `prepare`, `verify_shards` and the tokenizers, and prints what they return.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from titan_data.cli import download_tokenizer, inspect, merge, prepare, train_tokenizer, verify
from titan_data.errors import DataError

_COMMANDS = (prepare, merge, inspect, verify, train_tokenizer, download_tokenizer)
_EPILOG = """\
exit codes:
  0    success (verify: all files are valid)
  1    failure; the message says why (verify: lists every corrupt file)
  2    invalid command line
  130  stopped by Ctrl-C; finished work is kept
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="titan-data",
        description="Prepare text for training: tokenizers and token shards.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except DataError as error:
        for line in str(error).splitlines():
            print(f"titan-data: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("titan-data: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `titan-data inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
