"""The command line, `titan-ckpt`.

Exit codes: 0 success; 1 an error, or what was examined is corrupt or differs; 2 wrong usage; 130 interrupted by Ctrl-C.
Each command is a module with `declare` (its arguments) and `run`. Only the requested one is imported, because torch
takes seconds and `ls`, `prune` and `--help` do not need it.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from titan_ckpt.errors import CheckpointError
from titan_ckpt.messages import printable, reason_of

COMMANDS = {
    "ls": "list the checkpoints of a directory: steps, sizes, times, validity",
    "show": "show one checkpoint: names, shapes, dtypes, sizes, metadata, config",
    "verify": "verify every byte of a checkpoint, or of all checkpoints in a directory",
    "diff": "compare two checkpoints: names, shapes, largest absolute differences",
    "convert": "convert between titan-ckpt, Hugging Face, DCP (torchtitan), torch.save and Meta formats",
    "prune": "remove old checkpoints by a retention policy, or what was set aside; --dry-run only lists them",
    "restore": "go back to a checkpoint: make it the newest one; later ones are set aside, nothing is deleted",
    "pin": "keep a checkpoint whatever the retention policy",
    "unpin": "remove a pin",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="titan-ckpt",
        description="List, show, verify, compare, convert, prune, pin and restore checkpoints.",
        epilog="exit codes: 0 success; 1 error, corrupt or different; 2 wrong usage; 130 interrupted by Ctrl-C",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    asked = (sys.argv[1:] if argv is None else argv)[:1]
    try:
        if asked and asked[0] in parsers:
            importlib.import_module(f"titan_ckpt.cli.{asked[0]}").declare(parsers[asked[0]])
        arguments = parser.parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has printed the error or the help
        return stop.code if isinstance(stop.code, int) else 2
    except CheckpointError as error:
        lines = [printable(line) for line in str(error).splitlines()]
        print("\n".join([f"titan-ckpt: {lines[0] if lines else 'failed'}", *lines[1:]]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("titan-ckpt: interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RecursionError) as error:
        print(f"titan-ckpt: what it holds does not fit into memory ({printable(reason_of(error))})", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output, e.g. `head`, has exited
        sys.stdout = None  # or the interpreter would try to flush it at exit
        return 0
    except OSError as error:
        print(f"titan-ckpt: {printable(str(error) or reason_of(error))}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"titan-ckpt: unexpected error{_place_of(error)}: {printable(reason_of(error))}", file=sys.stderr)
        print("titan-ckpt: this is a mistake in titan-ckpt: please report it with the command", file=sys.stderr)
        return 1


def _place_of(error: Exception) -> str:
    """Return where an error was raised, for a report."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" in {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
