"""`titan-ckpt unpin`: remove a pin."""

import argparse

from titan_ckpt.manage.listing import unpin
from titan_ckpt.messages import printable


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="DIRECTORY", help="directory of checkpoints, as a path or URL")
    parser.add_argument("name", metavar="NAME", help="name of the pin")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Remove the pin."""
    unpin(arguments.directory, arguments.name)
    print(printable(f"the pin {arguments.name} is removed"))
    return 0
