"""`titan-ckpt prune`: remove the checkpoints that a retention policy does not keep."""

import argparse

from titan_ckpt.cli._text import size
from titan_ckpt.errors import CheckpointError
from titan_ckpt.manage.lineage import finish_moves
from titan_ckpt.manage.retention import KeepBest, PrunePlan, Retention, plan_clearing, plan_prune, prune
from titan_ckpt.messages import printable
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.lock import DirectoryLock
from titan_ckpt.storage.open import open_storage


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="DIRECTORY", help="directory of checkpoints, as a path or URL")
    parser.add_argument("--keep-last", type=int, metavar="K", help="keep the K newest checkpoints")
    parser.add_argument("--keep-every", type=int, metavar="N", help="keep checkpoints whose step is a multiple of N")
    parser.add_argument(
        "--keep-best",
        type=_best,
        metavar="METRIC[:max[:K]]",
        help="keep the K best checkpoints by a metric (default: 1, the lowest value)",
    )
    parser.add_argument(
        "--set-aside",
        action="store_true",
        help="remove all checkpoints that were set aside because the run went back or they were corrupt, unless pinned",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what stays and why, and what is removed; remove it unless --dry-run is given."""
    if arguments.keep_last is None and arguments.keep_best is None and not arguments.set_aside:
        parser.error("give --keep-last K, --keep-best METRIC, --set-aside, or several")
    policy = Retention(arguments.keep_last, arguments.keep_every, arguments.keep_best)
    storage = open_storage(arguments.directory)
    if not storage.names():
        raise CheckpointError(f"{arguments.directory}: no such directory, or it is empty")
    if arguments.dry_run:
        _print(_plan(storage, policy, set_aside=arguments.set_aside), "would be removed")
        return 0
    lock = DirectoryLock(storage)
    try:
        finish_moves(storage)
        plan = _plan(storage, policy, set_aside=arguments.set_aside)
        done = prune(storage, plan)
        _print(PrunePlan(plan.keep, {name: plan.remove[name] for name in done}), "removed")
    finally:
        lock.release()
    return 0 if len(done) == len(plan.remove) else 1


def _plan(storage: Storage, policy: Retention, *, set_aside: bool) -> PrunePlan:
    plan = plan_prune(storage, policy)
    if not set_aside:
        return plan
    clearing = plan_clearing(storage)
    return PrunePlan({**plan.keep, **clearing.keep}, {**plan.remove, **clearing.remove})


def _print(plan: PrunePlan, outcome: str) -> None:
    for name, reasons in plan.keep.items():
        print(printable(f"{name}  kept: {', '.join(reasons)}"))
    for name, nbytes in plan.remove.items():
        print(printable(f"{name}  {outcome}: {size(nbytes)}"))
    print(f"{len(plan.keep)} kept, {len(plan.remove)} {outcome} ({size(sum(plan.remove.values()))})")


def _best(text: str) -> KeepBest:
    """Parse METRIC, METRIC:max or METRIC:max:3."""
    metric, _, rest = text.partition(":")
    mode, _, count = rest.partition(":")
    try:
        return KeepBest(metric, mode or "min", int(count or 1))  # type: ignore[arg-type]  # Retention checks it
    except ValueError:
        raise argparse.ArgumentTypeError(f"{count!r} is not a number of checkpoints") from None
