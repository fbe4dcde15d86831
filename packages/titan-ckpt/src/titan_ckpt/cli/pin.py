"""`titan-ckpt pin`: keep a checkpoint whatever the retention policy."""

import argparse

from titan_ckpt.manage.listing import pin
from titan_ckpt.messages import printable


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="DIRECTORY", help="directory of checkpoints, as a path or URL")
    parser.add_argument("step", metavar="STEP", type=int, help="the checkpoint's step")
    parser.add_argument("name", metavar="NAME", help="name of the pin: letters, digits, '_', '.', '-'")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Pin the checkpoint; a pin of this name that exists already is moved."""
    pin(arguments.directory, arguments.step, arguments.name)
    print(printable(f"step {arguments.step} is pinned as {arguments.name}"))
    return 0
