"""`titan-ckpt restore`: go back to a checkpoint, or return to one that was set aside."""

import argparse

from titan_ckpt.manage.lineage import restore
from titan_ckpt.messages import printable


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="DIRECTORY", help="directory of checkpoints, as a path or URL")
    parser.add_argument(
        "which", metavar="STEP", type=_step_or_name, help="step, or name of a checkpoint that was set aside (see `ls`)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the checkpoint the newest one, and print what was renamed for that."""
    done = restore(arguments.directory, arguments.which)
    for old, new in done.set_aside.items():
        print(printable(f"{old}  set aside as {new}"))
    for old, new in done.brought_back.items():
        print(printable(f"{old}  is {new} again"))
    print(printable(f"the next run resumes from {done.head}"))
    return 0


def _step_or_name(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else text
