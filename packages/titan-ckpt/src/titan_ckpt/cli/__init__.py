"""The command line, `titan-ckpt`.

Exit codes: 0 all is well; 1 it failed, or what was looked at is damaged or differs; 2 the command line is wrong;
130 interrupted by Ctrl-C.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from titan_ckpt.cli._text import printable
from titan_ckpt.errors import CheckpointError

COMMANDS = {
    "ls": "list the checkpoints of a folder: steps, sizes, times, validity",
    "show": "show a checkpoint: names, shapes, dtypes, bytes, metadata, the config",
    "verify": "check every byte of a checkpoint, or of all in a folder",
    "diff": "compare two checkpoints: names, shapes, largest absolute differences",
    "convert": "convert between this package's format, Hugging Face's, DCP (torchtitan), torch.save and Meta's files",
    "prune": "remove checkpoints that are not to be kept; --dry-run to only look",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="titan-ckpt",
        description="Look at checkpoints, check, compare, convert and clear them away.",
        epilog="exit codes: 0 all is well; 1 failed, damaged or different; 2 the command line is wrong; 130 Ctrl-C",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {name: commands.add_parser(name, help=told) for name, told in COMMANDS.items()}
    asked = (sys.argv[1:] if argv is None else argv)[:1]
    try:
        if asked and asked[0] in parsers:
            # No other is imported: those that look into tensors bring torch, which takes seconds.
            importlib.import_module(f"titan_ckpt.cli.{asked[0]}").declare(parsers[asked[0]])
        arguments = parser.parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has told what is wrong, or shown the help
        return stop.code if isinstance(stop.code, int) else 2
    except CheckpointError as error:
        lines = [printable(line) for line in str(error).splitlines()]
        print("\n".join([f"titan-ckpt: {lines[0] if lines else 'failed'}", *lines[1:]]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("titan-ckpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None  # nothing is left to be flushed at exit
        return 0
    except OSError as error:
        print(f"titan-ckpt: {printable(str(error))}", file=sys.stderr)
        return 1
