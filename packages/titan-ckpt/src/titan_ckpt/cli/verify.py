"""`titan-ckpt verify`: read every byte and compare it with its checksum."""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import MANIFEST, Manifest, read_manifest
from titan_ckpt.manage.listing import step_names
from titan_ckpt.manage.verify import find_corruption
from titan_ckpt.messages import local_path, printable
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage, parent_and_name


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or a directory of checkpoints, as a path or URL")
    parser.add_argument(
        "--threads",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="number of files to read concurrently (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not show a progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify; print one line per checkpoint, followed by its problems."""
    if arguments.threads < 1:
        raise CheckpointError(f"--threads must be at least 1, not {arguments.threads}")
    storage, names = _checkpoints_at(arguments.path)
    manifests: dict[str, Manifest] = {}
    problems: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        try:
            manifests[name] = read_manifest(storage, name)
        except CheckpointError as error:
            problems[name].append(str(error))
    for name, found in _verify(storage, manifests, arguments.threads, quiet=arguments.quiet).items():
        problems[name] += found
    for name in names:
        print(f"{printable(name)}: {'CORRUPT' if problems[name] else 'valid'}")
        for problem in problems[name]:
            print(f"  {printable(problem)}")
    return 1 if any(problems.values()) else 0


def _checkpoints_at(path: str) -> tuple[Storage, list[str]]:
    directory = open_storage(path)
    held = directory.names()
    names = step_names(directory)
    if names and MANIFEST not in held:
        return directory, names
    if not held:
        raise CheckpointError(f"{path}: no such directory, or it is empty")
    parent, name = parent_and_name(os.path.abspath(local_path(path)) if "://" not in path else path)  # noqa: PTH100  (keeps links)
    return open_storage(parent), [name]


def _verify(storage: Storage, manifests: dict[str, Manifest], threads: int, *, quiet: bool) -> dict[str, list[str]]:
    """Read all files of all checkpoints concurrently, the largest first; return the problems."""
    work = [
        (record.size, name, file) for name, manifest in manifests.items() for file, record in manifest.files.items()
    ]
    columns = (
        TextColumn("verify"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    hidden = quiet or not sys.stderr.isatty()
    problems: dict[str, list[str]] = {name: [] for name in manifests}
    with (
        Progress(*columns, console=Console(stderr=True), disable=hidden) as progress,
        ThreadPoolExecutor(threads, thread_name_prefix="titan-ckpt-verify") as pool,
    ):
        task = progress.add_task("verify", total=sum(length for length, _, _ in work))

        def check(length: int, name: str, file: str) -> list[str]:
            left = length

            def advance(nbytes: int) -> None:
                nonlocal left
                left -= nbytes
                progress.advance(task, nbytes)

            found = find_corruption(storage, name, manifests[name], [file], advance)
            progress.advance(task, left)  # for a file that was not read to its end
            return found

        running = {pool.submit(check, *file): file[1] for file in sorted(work, reverse=True)}
        try:
            for done in as_completed(running):
                found = problems[running[done]]
                found += [problem for problem in done.result() if problem not in found]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return problems
