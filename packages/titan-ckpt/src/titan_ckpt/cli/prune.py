"""`titan-ckpt prune`: clear away checkpoints that a retention policy does not keep."""

import argparse
from typing import Any

from titan_ckpt.cli._text import printable, size
from titan_ckpt.errors import CheckpointError
from titan_ckpt.manage.retention import KeepBest, Retention, plan_prune, prune
from titan_ckpt.storage.lock import FolderLock
from titan_ckpt.storage.open import open_storage


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder of checkpoints, as a path or URL")
    parser.add_argument("--keep-last", type=int, metavar="K", help="keep the newest K")
    parser.add_argument("--keep-every", type=int, metavar="N", help="keep those whose step N divides")
    parser.add_argument("--keep-best", type=_best, metavar="METRIC[:max[:K]]", help="keep the best K by a metric")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be removed, and remove nothing")
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Tell what stays and why, and what goes; then let it go."""
    if arguments.keep_last is None and arguments.keep_best is None:
        parser.error("say what to keep: --keep-last K, --keep-best METRIC, or both")
    policy = Retention(arguments.keep_last, arguments.keep_every, arguments.keep_best)
    storage = open_storage(arguments.folder)
    if not storage.names():
        raise CheckpointError(f"{arguments.folder}: there is no such folder, or it is empty")
    if arguments.dry_run:
        _print(plan_prune(storage, policy), "would be removed")
        return 0
    lock = FolderLock(storage)
    try:
        plan = plan_prune(storage, policy)
        prune(storage, plan)
        _print(plan, "removed")
    finally:
        lock.release()
    return 0


def _print(plan: Any, told: str) -> None:
    for name, reasons in plan.keep.items():
        print(printable(f"{name}  kept: {', '.join(reasons)}"))
    for name, nbytes in plan.remove.items():
        print(printable(f"{name}  {told}: {size(nbytes)}"))
    print(f"{len(plan.keep)} kept, {len(plan.remove)} {told} ({size(sum(plan.remove.values()))})")


def _best(text: str) -> KeepBest:
    """Read METRIC, METRIC:max or METRIC:max:3."""
    metric, _, rest = text.partition(":")
    mode, _, count = rest.partition(":")
    try:
        return KeepBest(metric, mode or "min", int(count or 1))  # type: ignore[arg-type]  # Retention checks it
    except ValueError:
        raise argparse.ArgumentTypeError(f"{count!r} is no number of checkpoints") from None
