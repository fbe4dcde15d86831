"""One save, from tensors and JSON to a published checkpoint.

Everything is written under a staging name, each file synced to the disk, the manifest last; then one rename makes
the folder a checkpoint. A kill at any instant leaves either that checkpoint or none, and never touches another one.
"""

import importlib.metadata
import json
import logging
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.manifest import MANIFEST, STATE, TENSORS, FileRecord, Manifest, describe_file, folder_name
from titan_ckpt.reader import problems_of
from titan_ckpt.retention import aside, clear_leftovers, prune
from titan_ckpt.snapshot import Snapshot

logger = logging.getLogger(__name__)


def write_checkpoint(ranks: Ranks, folder: Path, snapshot: Snapshot, keep_last: int | None) -> None:
    """Write and publish a checkpoint, then clear away old ones; collective.

    Args:
        ranks: who takes part.
        folder: where the checkpoints are; made if need be.
        snapshot: what to write.
        keep_last: how many to keep; None for all.

    Raises:
        CheckpointError: on all ranks, when it failed on one; former checkpoints are untouched.
    """
    # DCP brings sympy and two seconds of import with it: only those who save or load pay.
    from titan_ckpt.tensors import write_tensors

    final = folder / folder_name(snapshot.step)
    if _stands(ranks, final):
        return
    staging = folder / ranks.on_first(f"make a staging folder in {folder}", lambda: _make_staging(final))
    try:
        index = write_tensors(ranks, staging / TENSORS, snapshot.tensors)
        records = ranks.gather(ranks.together("hash the files", lambda: _own_files(staging, ranks.rank)))
        files = {name: record for part in records for name, record in part.items()}
        ranks.on_first(f"publish {final}", lambda: _publish(staging, final, snapshot, index, files, ranks.world))
    except CheckpointError:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    if ranks.rank == 0:
        logger.info("saved %s", final)
        _tidy(folder, snapshot.step, keep_last)


def _stands(ranks: Ranks, final: Path) -> bool:
    """Tell whether the step is there already, in good order; a damaged one is moved aside."""
    if not ranks.on_first(f"look for {final}", final.exists):
        return False
    problems = problems_of(ranks, final)
    if not problems:
        if ranks.rank == 0:
            logger.warning("%s exists and is sound: it is not written again", final)
        return True

    def move() -> None:
        moved = final.rename(aside(final.parent, "damaged", final.name))
        logger.warning("%s was damaged (%s): moved to %s", final, "; ".join(problems), moved.name)

    ranks.on_first(f"move the damaged {final} aside", move)
    return False


def _make_staging(final: Path) -> str:
    staging = aside(final.parent, "staging", final.name)
    (staging / TENSORS).mkdir(parents=True)
    return staging.name


def _own_files(staging: Path, rank: int) -> dict[str, FileRecord]:
    """Hash the files that this rank wrote; DCP names them `__<rank>_<n>.distcp`, and its record is rank 0's."""
    paths = list((staging / TENSORS).glob(f"__{rank}_*.distcp"))
    if rank == 0:
        paths.append(staging / TENSORS / ".metadata")
    return {f"{TENSORS}/{path.name}": describe_file(path) for path in paths}


def _publish(
    staging: Path, final: Path, snapshot: Snapshot, index: dict[str, Any], files: dict[str, FileRecord], world: int
) -> None:
    _write_synced(staging / STATE, json.dumps({"values": snapshot.values, "tensors": index}))
    manifest = Manifest(
        step=snapshot.step,
        files={STATE: describe_file(staging / STATE), **dict(sorted(files.items()))},
        metadata=snapshot.metadata,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        titan_ckpt=_own_version(),
        torch=str(torch.__version__),
        world_size=world,
    )
    _sync_folder(staging / TENSORS)
    _write_synced(staging / MANIFEST, manifest.to_json())
    _sync_folder(staging)
    os.rename(staging, final)  # fails where something holds files under that name: nothing is ever overwritten
    _sync_folder(final.parent)


def _tidy(folder: Path, published: int, keep_last: int | None) -> None:
    """Clear away what is no longer wanted; the checkpoint is safe by now, so a failure here is only told."""
    try:
        for step in prune(folder, published, keep_last):
            logger.info("removed the checkpoint of step %d, keeping the last %d", step, keep_last)
        clear_leftovers(folder)
    except OSError as error:
        logger.warning("could not clear away old checkpoints in %s: %s", folder, error)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable, not only the bytes of its files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _own_version() -> str:
    try:
        return importlib.metadata.version("titan-ckpt")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
