"""One save, from planned parts to a published checkpoint.

Nothing that readers look at changes before the one act that publishes. A kill at any instant leaves either the whole
checkpoint or none, and never touches another one.
"""

import logging
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
    FileRecord,
    Manifest,
    folder_name,
    manifest_text,
    read_manifest,
)
from titan_ckpt.format.safetensors_header import make_header
from titan_ckpt.manage.listing import LATEST
from titan_ckpt.manage.retention import Retention, plan_prune, prune
from titan_ckpt.manage.verify import damage_in
from titan_ckpt.save.file_writer import WrittenFile
from titan_ckpt.save.plan import PlannedFile
from titan_ckpt.state.shards import Part
from titan_ckpt.storage.base import Staged, Storage
from titan_ckpt.storage.lock import FolderLock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What is written about a checkpoint besides its content.

    Attributes:
        step: the step.
        metadata: the caller's words, encoded.
        metrics: the caller's numbers.
        parent: step and digest of the checkpoint that this run loaded or saved before; None for none.
    """

    step: int
    metadata: Any
    metrics: Mapping[str, float]
    parent: Mapping[str, Any] | None


@dataclass(frozen=True)
class Order:
    """What one rank has to write.

    Attributes:
        origin: what is written about the checkpoint.
        values: what is not a tensor, encoded; rank 0's count.
        own: this rank's files.
        all_files: every rank's files; known to rank 0, empty elsewhere.
        write_file: writes one of this rank's files: given its place in `own`, the path and the header.
    """

    origin: Origin
    values: Mapping[str, Any]
    own: Sequence[PlannedFile]
    all_files: Sequence[PlannedFile]
    write_file: Callable[[int, str, bytes], WrittenFile]


def write_checkpoint(ranks: Ranks, storage: Storage, lock: FolderLock | None, order: Order) -> str | None:
    """Write and publish a checkpoint; collective.

    Args:
        ranks: who takes part.
        storage: where the checkpoints are.
        lock: rank 0's right to write there, None elsewhere.
        order: what to write.

    Returns:
        The digest of its manifest; None when the step was there already and sound.

    Raises:
        CheckpointError: on all ranks, when it failed on one; former checkpoints are untouched.
    """
    final = folder_name(order.origin.step)
    if _stands(ranks, storage, final):
        return None
    staged = ranks.on_first(f"begin a checkpoint in {storage.url}", lambda: storage.stage(final))
    try:
        written = ranks.gather(
            ranks.together(f"write the tensors to {storage.url}", lambda: _write_own(storage, staged, order))
        )
        digest = ranks.on_first(
            f"publish {storage.url}/{final}",
            lambda: _publish(storage, lock, staged, order, [file for part in written for file in part], ranks.world),
        )
    except BaseException:
        if ranks.rank == 0:
            storage.abandon(staged)
        raise
    if ranks.rank == 0:
        logger.info("saved %s/%s", storage.url, final)
        _point_at(storage, final)
    return digest


def tidy(storage: Storage, lock: FolderLock, retention: Retention, published: int) -> None:
    """Clear away what is no longer wanted; the checkpoint is safe by now, so a failure here is only told.

    Args:
        storage: where the checkpoints are.
        lock: the right to write there.
        retention: what to keep.
        published: the step just saved.
    """
    try:
        lock.confirm()
        plan = plan_prune(storage, retention, published)
        prune(storage, plan)
        for name in plan.remove:
            logger.info("removed %s: %s does not keep it", name, retention)
        for name in storage.clear_leftovers():
            logger.info("removed %s, left by a job that was cut off", name)
    except Exception as error:  # a store's client has exceptions of its own
        logger.warning("could not clear away old checkpoints in %s: %s", storage.url, error)


def _stands(ranks: Ranks, storage: Storage, final: str) -> bool:
    """Tell whether the step is there already, in good order; a damaged one is moved aside."""
    manifest, problem = ranks.on_first(f"look for {storage.url}/{final}", lambda: _present(storage, final))
    if manifest is not None:
        problems = shared_check(ranks, storage, final, manifest)
    elif problem is not None:
        problems = [problem]
    else:
        return False
    if not problems:
        if ranks.rank == 0:
            logger.warning("%s/%s exists and is sound: it is not written again", storage.url, final)
        return True

    def move() -> None:
        aside = storage.set_aside(final)
        logger.warning("%s/%s was damaged (%s): moved to %s", storage.url, final, "; ".join(problems), aside)

    ranks.on_first(f"move the damaged {final} aside", move)
    return False


def shared_check(ranks: Ranks, storage: Storage, name: str, manifest: Manifest) -> list[str]:
    """Check every byte of a checkpoint, each rank its share of the files; collective.

    Returns:
        What is wrong with it, the same on all ranks; empty when it is sound.
    """
    # The largest first, dealt out one by one: the ranks read about as much each.
    files = sorted(manifest.files, key=lambda file: -manifest.files[file].size)[ranks.rank :: ranks.world]
    told = ranks.share(f"check {storage.url}/{name}", lambda: damage_in(storage, name, manifest, files))
    return list(dict.fromkeys(problem for part in told for problem in part))


def _present(storage: Storage, final: str) -> tuple[Manifest | None, str | None]:
    if not storage.has(final):
        return None, None
    try:
        return read_manifest(storage, final), None
    except CheckpointError as error:
        return None, str(error)


def _write_own(storage: Storage, staged: Staged, order: Order) -> list[WrittenFile]:
    written = []
    for place, file in enumerate(order.own):
        header = make_header(
            [(chunk_key(part.name, part.shape, part.box), part.dtype, part.box.lengths) for part in file.parts]
        )
        written.append(order.write_file(place, f"{staged.folder}/{staged.prefix}{file.name}", header))
    return written


def _publish(
    storage: Storage,
    lock: FolderLock | None,
    staged: Staged,
    order: Order,
    written: Sequence[WrittenFile],
    world: int,
) -> str:
    records: dict[str, FileRecord] = {}
    chunks: dict[str, list[tuple[Part, str, tuple[str, ...]]]] = {}
    for file, result in zip(order.all_files, written, strict=True):
        name = f"{staged.prefix}{file.name}"
        records[name] = FileRecord(result.size, result.checksum)
        for part, hashes in zip(file.parts, result.pieces, strict=True):
            chunks.setdefault(part.name, []).append((part, name, hashes))
    text = content_text(order.values, {name: _spec(chunks[name]) for name in sorted(chunks)}, PIECE_BYTES)
    sink = storage.create(f"{staged.folder}/{STATE}")
    try:
        sink.write(text)
    except BaseException:
        sink.discard()
        raise
    sink.close()
    origin = order.origin
    manifest = manifest_text(
        origin.step,
        datetime.now(UTC).isoformat(timespec="seconds"),
        {STATE: FileRecord(len(text), checksum(text)), **records},
        _lineage(origin, world),
        origin.metrics,
        origin.metadata,
    )
    if lock is not None:
        lock.confirm()
    storage.publish(staged, manifest.text)
    return manifest.digest


def _spec(chunks: Sequence[tuple[Part, str, tuple[str, ...]]]) -> TensorSpec:
    first = chunks[0][0]
    found = [
        Chunk(file, chunk_key(part.name, part.shape, part.box), *part.box, hashes) for part, file, hashes in chunks
    ]
    return TensorSpec(first.dtype, first.shape, tuple(sorted(found, key=lambda chunk: chunk.offsets)))


def _lineage(origin: Origin, world: int) -> dict[str, Any]:
    told = decode(origin.metadata)
    return {
        **{key: told.get(key) for key in LINEAGE_FROM_METADATA},
        "parent": origin.parent,
        "world_size": world,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "titan_ckpt": own_version(),
            "torch": str(torch.__version__),
        },
    }


def _point_at(storage: Storage, final: str) -> None:
    try:
        storage.replace(LATEST, f"{final}\n".encode())
    except Exception as error:  # readers do not need it: the checkpoint is there
        logger.warning("could not move %s/%s to %s: %s", storage.url, LATEST, final, error)


def own_version() -> str:
    """Return this package's version."""
    try:
        return version("titan-ckpt")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
