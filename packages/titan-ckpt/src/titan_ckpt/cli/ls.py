"""`titan-ckpt ls`: the checkpoints of a folder."""

import argparse
import json
from typing import Any

from titan_ckpt.cli._text import printable, size, table
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import read_manifest, step_of
from titan_ckpt.manage.listing import latest_in, pins_in, step_names
from titan_ckpt.manage.size_check import wrong_sizes
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder of checkpoints, as a path or URL")
    parser.add_argument(
        "--check", action="store_true", help="read every byte to tell which are sound, not only which are complete"
    )
    parser.add_argument("--json", action="store_true", help="write JSON: a list, oldest step first")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List, oldest step first; damaged ones with what is wrong."""
    storage = open_storage(arguments.folder)
    names = step_names(storage)
    if not names and not storage.names():
        raise CheckpointError(f"{arguments.folder}: there is no such folder, or it is empty")
    pins = pins_in(storage)
    latest = latest_in(storage)
    found = [_described(storage, name, arguments.check, latest, pins) for name in names]
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [["STEP", "CREATED", "SIZE", "STATE", ""]]
    for entry in found:
        marks = ["latest"] * entry["latest"] + [f"pinned as {pin}" for pin in entry["pins"]]
        created, nbytes = entry["created"] or "?", "?" if entry["bytes"] is None else size(entry["bytes"])
        whole = "sound" if arguments.check else "complete"  # sizes alone do not tell that the bytes are right
        state = whole if not entry["problems"] else "DAMAGED: " + "; ".join(entry["problems"])
        rows.append([printable(cell) for cell in (str(entry["step"]), created, nbytes, state, ", ".join(marks))])
    print(table(rows) if found else "no checkpoints")
    return 0


def _described(storage: Storage, name: str, check: bool, latest: str | None, pins: dict[str, str]) -> dict[str, Any]:
    path = f"{storage.url.rstrip('/')}/{name}"
    try:
        manifest = read_manifest(storage, name)
        created, nbytes, metrics = manifest.created, manifest.nbytes, manifest.metrics
        problems = _damage_at(path) if check else wrong_sizes(storage, name, manifest)
    except CheckpointError as error:
        created, nbytes, metrics, problems = None, None, {}, [str(error)]
    return {
        "step": step_of(name),
        "path": path,
        "created": created,
        "bytes": nbytes,
        "sound": not problems,
        "checked": "checksum" if check else "size",
        "problems": problems,
        "metrics": metrics,
        "latest": name == latest,
        "pins": sorted(pin for pin, target in pins.items() if target == name),
    }


def _damage_at(path: str) -> list[str]:
    from titan_ckpt.manage.verify import verify  # it needs torch, which takes seconds to import

    return verify(path, "checksum")
