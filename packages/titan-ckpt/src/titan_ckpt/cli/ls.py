"""`titan-ckpt ls`: list the checkpoints of a directory."""

import argparse
import sys
from typing import Any

from titan_ckpt.cli._text import size, table, to_json
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import read_manifest, step_of
from titan_ckpt.manage.listing import aside_names, latest_in, pins_in, step_names, step_of_aside
from titan_ckpt.manage.size_check import size_problems
from titan_ckpt.messages import printable, reason_of
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", metavar="DIRECTORY", help="directory of checkpoints, as a path or URL")
    parser.add_argument(
        "--check", action="store_true", help="verify every byte; by default only file sizes are compared"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list; the order is the same")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List the checkpoints, oldest step first, then those that were set aside; corrupt ones with their problems."""
    storage = open_storage(arguments.directory)
    names = [*step_names(storage), *aside_names(storage)]
    if not names and not storage.names():
        raise CheckpointError(f"{arguments.directory}: no such directory, or it is empty")
    pins = _pins_of(storage)
    latest = latest_in(storage)
    found = [_describe(storage, name, latest, pins, check=arguments.check) for name in names]
    if arguments.json:
        print(to_json(found))
        return 0
    rows = [["STEP", "CREATED", "SIZE", "STATE", ""]]
    for entry in found:
        marks = ["latest"] * entry["latest"] + [f"pinned as {pin}" for pin in entry["pins"]]
        marks += [f"set aside as {entry['name']}"] * entry["set_aside"]
        created, nbytes = entry["created"] or "?", "?" if entry["bytes"] is None else size(entry["bytes"])
        intact = "valid" if arguments.check else "complete"  # "complete": sizes do not prove that the bytes are right
        state = intact if not entry["problems"] else "CORRUPT: " + "; ".join(entry["problems"])
        rows.append([printable(cell) for cell in (str(entry["step"]), created, nbytes, state, ", ".join(marks))])
    print(table(rows) if found else "no checkpoints")
    return 0


def _pins_of(storage: Storage) -> dict[str, str]:
    try:
        return pins_in(storage)
    except OSError as error:
        print(f"titan-ckpt: the pins cannot be read: {printable(reason_of(error))}", file=sys.stderr)
        return {}


def _describe(storage: Storage, name: str, latest: str | None, pins: dict[str, str], *, check: bool) -> dict[str, Any]:
    path = f"{storage.url.rstrip('/')}/{name}"
    try:
        manifest = read_manifest(storage, name)
        created, nbytes, metrics = manifest.created, manifest.nbytes, manifest.metrics
        problems = _verify(path) if check else size_problems(storage, name, manifest)
    except CheckpointError as error:
        created, nbytes, metrics, problems = None, None, {}, [str(error)]
    return {
        "step": step_of(name) if step_of_aside(name) is None else step_of_aside(name),
        "name": name,
        "set_aside": step_of_aside(name) is not None,
        "path": path,
        "created": created,
        "bytes": nbytes,
        "valid": not problems,
        "checked": "checksum" if check else "size",
        "problems": problems,
        "metrics": metrics,
        "latest": name == latest,
        "pins": sorted(pin for pin, target in pins.items() if target == name),
    }


def _verify(path: str) -> list[str]:
    from titan_ckpt.manage.verify import verify  # imports torch, which takes seconds

    return verify(path, "checksum")
