"""The command line: `titan-data COMMAND ...`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from titan_data.cli import download_tokenizer, inspect, prepare, train_tokenizer, verify
from titan_data.errors import DataError

_COMMANDS = (prepare, inspect, verify, train_tokenizer, download_tokenizer)
_EPILOG = """\
exit codes:
  0    done (verify: no damage)
  1    failed, the message says why (verify: damage, every damaged file is named)
  2    the command line cannot work
  130  stopped by Ctrl-C; what was finished is kept
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="titan-data",
        description="Text to tokens for training: tokenizers and token shards.",
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
