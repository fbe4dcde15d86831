"""One save, from planned files to a published checkpoint.

Called by the checkpointer with a `WriteJob`. Nothing that readers look at changes before `storage.publish`. A kill at
any instant leaves either the complete checkpoint or none, and never affects another one.
"""

import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.checksum import PIECE_BYTES, checksum
from titan_ckpt.format.index import Chunk, TensorSpec, chunk_key, content_text
from titan_ckpt.format.json_values import decode
from titan_ckpt.format.manifest import (
    LINEAGE_FROM_METADATA,
    STATE,
    Branches,
    FileRecord,
    Manifest,
    directory_name,
    manifest_text,
    read_manifest,
)
from titan_ckpt.format.safetensors_header import make_header
from titan_ckpt.manage.lineage import Head, new_branch
from titan_ckpt.manage.listing import point_at
from titan_ckpt.manage.retention import Retention, plan_prune, prune
from titan_ckpt.manage.verify import find_corruption
from titan_ckpt.messages import get_logger, reason_of
from titan_ckpt.save.file_writer import WrittenFile
from titan_ckpt.save.plan import PlannedFile
from titan_ckpt.state.shards import Part
from titan_ckpt.storage.base import PendingCheckpoint, Storage
from titan_ckpt.storage.lock import DirectoryLock

logger = get_logger(__name__)


@dataclass(frozen=True)
class Origin:
    """What the manifest says about a checkpoint besides its files.

    Attributes:
        step: The step.
        metadata: The caller's metadata, encoded.
        metrics: The caller's metrics.
        head: The checkpoint that this run loaded or saved before, with the branch on which it goes on; None if there
            is none.
    """

    step: int
    metadata: Any
    metrics: Mapping[str, float]
    head: Head | None


@dataclass(frozen=True)
class WriteJob:
    """What one rank has to write.

    Attributes:
        origin: What the manifest says about the checkpoint.
        values: The encoded values; those of rank 0 are written.
        own: This rank's files.
        all_files: Every rank's files in rank order on rank 0, empty elsewhere.
        write_file: Writes one of this rank's files, given its index in `own`, its path and its header.
        before_publishing: Called on rank 0 with what becomes the head if the next operation succeeds.
    """

    origin: Origin
    values: Mapping[str, Any]
    own: Sequence[PlannedFile]
    all_files: Sequence[PlannedFile]
    write_file: Callable[[int, str, bytes], WrittenFile]
    before_publishing: Callable[[Head], None] = lambda head: None


def write_checkpoint(ranks: Ranks, storage: Storage, lock: DirectoryLock | None, job: WriteJob) -> Head | None:
    """Write and publish a checkpoint; collective.

    Args:
        ranks: The participating ranks.
        storage: The directory of checkpoints.
        lock: The lock of the directory on rank 0, None elsewhere.
        job: What to write.

    Returns:
        The checkpoint as the run's new head; None if it is the head already, and valid.

    Raises:
        CheckpointError: On all ranks, if it failed on any; existing checkpoints are untouched.
    """
    final = directory_name(job.origin.step)
    if _is_head(ranks, storage, final, job.origin.head):
        return None
    pending = ranks.run_on_rank_0(f"begin a checkpoint in {storage.url}", lambda: storage.begin(final))
    try:
        what = f"write the tensors to {storage.url}"
        written = ranks.gather(what, ranks.run_on_all(what, lambda: _write_own(storage, pending, job)))
        files = [file for of_rank in written for file in of_rank]
        head = ranks.run_on_rank_0(
            f"publish {storage.url}/{final}",
            lambda: _publish(storage, lock, pending, job, _Written(files, ranks.world_size)),
        )
    except BaseException:
        if ranks.rank == 0:
            storage.abort(pending)
        raise
    if ranks.rank == 0:
        logger.info("saved %s/%s", storage.url, final)
        point_at(storage, final)
    return head


def prune_old(storage: Storage, lock: DirectoryLock, retention: Retention) -> None:
    """Apply the retention policy after a save. The new checkpoint is safe by then, so a failure is only logged.

    Args:
        storage: The directory of checkpoints.
        lock: Its lock.
        retention: What to keep.
    """
    try:
        lock.confirm()
        for name in storage.clear_leftovers():
            logger.info("removed %s, left by an interrupted job", name)
        for name in prune(storage, plan_prune(storage, retention)):
            logger.info("removed %s, not kept by %s", name, retention)
    except Exception as error:  # whatever a storage raises
        logger.warning("could not remove old checkpoints in %s: %s", storage.url, reason_of(error))


def _is_head(ranks: Ranks, storage: Storage, final: str, head: Head | None) -> bool:
    """Return whether the step is the run's head already and valid; a corrupt one is moved aside.

    Raises:
        CheckpointError: If the step exists, but is not what this run loaded or saved.
    """
    manifest, problem = ranks.run_on_rank_0(f"look for {storage.url}/{final}", lambda: _existing(storage, final))
    if manifest is not None:
        problems = shared_check(ranks, storage, final, manifest)
    elif problem is not None:
        problems = [problem]
    else:
        return False
    if not problems:
        if manifest is None or head is None or manifest.digest != head.digest:
            raise CheckpointError(
                f"{storage.url}/{final} exists, and is not what this run loaded or saved last: existing checkpoints "
                "are never overwritten; is another job writing there?"
            )
        if ranks.rank == 0:
            logger.warning("%s/%s is saved already and valid: not written again", storage.url, final)
        return True

    def move() -> None:
        aside = f".damaged-{final}-{secrets.token_hex(4)}"
        storage.rename(final, aside)
        logger.warning("%s/%s was corrupt (%s): moved to %s", storage.url, final, "; ".join(problems), aside)

    ranks.run_on_rank_0(f"move the corrupt {final} aside", move)
    return False


def shared_check(ranks: Ranks, storage: Storage, name: str, manifest: Manifest) -> list[str]:
    """Verify every byte of a checkpoint, each rank its share of the files; collective.

    Returns:
        The problems, the same on all ranks; empty if it is valid.
    """
    # Dealt out one by one in order of size, so that all ranks read about the same amount.
    files = sorted(manifest.files, key=lambda file: -manifest.files[file].size)[ranks.rank :: ranks.world_size]
    found = ranks.gather_from_all(
        f"verify {storage.url}/{name}", lambda: find_corruption(storage, name, manifest, files)
    )
    return list(dict.fromkeys(problem for of_rank in found for problem in of_rank))


def _existing(storage: Storage, final: str) -> tuple[Manifest | None, str | None]:
    """Return the manifest of an existing checkpoint, or what is wrong with it; nothing if there is none."""
    if not storage.has(final):
        return None, None
    try:
        return read_manifest(storage, final), None
    except CheckpointError as error:
        return None, str(error)


def _write_own(storage: Storage, pending: PendingCheckpoint, job: WriteJob) -> list[WrittenFile]:
    written = []
    for place, file in enumerate(job.own):
        header = make_header(
            [(chunk_key(part.name, part.shape, part.box), part.dtype, part.box.lengths) for part in file.parts]
        )
        written.append(job.write_file(place, f"{pending.directory}/{pending.prefix}{file.name}", header))
    return written


@dataclass(frozen=True)
class _Written:
    """What all ranks wrote.

    Attributes:
        files: The result for each of `WriteJob.all_files`.
        world_size: The number of ranks.
    """

    files: Sequence[WrittenFile]
    world_size: int


def _publish(
    storage: Storage, lock: DirectoryLock | None, pending: PendingCheckpoint, job: WriteJob, written: _Written
) -> Head:
    """Write state.json and the manifest and publish the checkpoint; return it as the new head. Rank 0 only."""
    branches = job.origin.head.branches if job.origin.head else ((new_branch(), None),)
    records: dict[str, FileRecord] = {}
    chunks: dict[str, list[tuple[Part, str, tuple[str, ...]]]] = {}
    for file, result in zip(job.all_files, written.files, strict=True):
        name = f"{pending.prefix}{file.name}"
        records[name] = FileRecord(result.size, result.checksum)
        for part, hashes in zip(file.parts, result.pieces, strict=True):
            chunks.setdefault(part.name, []).append((part, name, hashes))
    text = content_text(job.values, {name: _spec(chunks[name]) for name in sorted(chunks)}, PIECE_BYTES)
    sink = storage.create(f"{pending.directory}/{STATE}")
    try:
        sink.write(text)
    except BaseException:
        sink.discard()
        raise
    sink.close()
    manifest = manifest_text(
        step=job.origin.step,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={STATE: FileRecord(len(text), checksum(text)), **records},
        lineage=_lineage(job.origin, branches, written.world_size),
        metrics=job.origin.metrics,
        metadata=job.origin.metadata,
    )
    if lock is not None:
        lock.confirm()
    head = Head(job.origin.step, manifest.digest, branches)
    job.before_publishing(head)
    storage.publish(pending, manifest.text)
    return head


def _spec(chunks: Sequence[tuple[Part, str, tuple[str, ...]]]) -> TensorSpec:
    first = chunks[0][0]
    found = [
        Chunk(file, chunk_key(part.name, part.shape, part.box), *part.box, hashes) for part, file, hashes in chunks
    ]
    return TensorSpec(first.dtype, first.shape, tuple(sorted(found, key=lambda chunk: chunk.offsets)))


def _lineage(origin: Origin, branches: Branches, world_size: int) -> dict[str, Any]:
    metadata, parent = decode(origin.metadata), origin.head
    return {
        **{key: metadata.get(key) for key in LINEAGE_FROM_METADATA},
        "parent": None if parent is None else {"step": parent.step, "digest": parent.digest},
        "branches": branches,
        "world_size": world_size,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "titan_ckpt": own_version(),
            "torch": str(torch.__version__),
        },
    }


def own_version() -> str:
    """Return this package's version."""
    try:
        return version("titan-ckpt")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
