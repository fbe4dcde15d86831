"""`import_weights`: write any source as a checkpoint of this package, one tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_ckpt.collective import Ranks
from titan_ckpt.convert.source import Cast, Exclude, TensorSource
from titan_ckpt.convert.weight_map import WeightMap, through
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import full_box
from titan_ckpt.format.json_values import encode
from titan_ckpt.format.manifest import directory_name
from titan_ckpt.format.safetensors_header import bytes_of, is_storable
from titan_ckpt.manage.lineage import finish_moves
from titan_ckpt.save.file_writer import WrittenFile, write_file
from titan_ckpt.save.plan import FILE_BYTES, PlannedFile, assign_writes
from titan_ckpt.save.writer import Origin, WriteJob, write_checkpoint
from titan_ckpt.state.shards import Part
from titan_ckpt.storage.lock import DirectoryLock
from titan_ckpt.storage.open import open_storage


def import_weights(
    source: TensorSource,
    directory: str | Path,
    step: int = 0,
    weight_map: WeightMap | None = None,
    *,
    prefix: str = "model/",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Write external weights as a checkpoint, from which a run can load its model.

    Args:
        source: The weights, see `open_source`.
        directory: The directory of checkpoints, as a path or URL; created if necessary.
        step: The step of the checkpoint.
        weight_map: Converts external tensors to internal ones; None if names and shapes are the same.
        prefix: Prefix to add to the tensors' names: the model's name in the state, and "/".
        dtype: The dtype to write floating-point weights in; None keeps their dtypes.
        ignore: Shell patterns of external names to ignore.

    Raises:
        CheckpointError: If the map does not match the weights, the step exists, or it cannot be written.
    """
    seen: TensorSource = Exclude(source, ignore)
    if weight_map is not None:
        seen = through(seen, weight_map, "to_internal")
    if dtype is not None:
        seen = Cast(seen, dtype)
    write_titan(seen, directory, step, prefix=prefix)


def write_titan(
    source: TensorSource,
    directory: str | Path,
    step: int,
    *,
    prefix: str = "",
    metadata: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a source as the checkpoint of a step, one tensor at a time, in a single process.

    Args:
        source: The tensors and values.
        directory: The directory of checkpoints, as a path or URL; created if necessary.
        step: The step.
        prefix: Prefix to add to the tensors' names, e.g. `model/`.
        metadata: JSON values to keep with it.
        file_bytes: Approximate maximum file size.

    Raises:
        CheckpointError: If the step exists, or it cannot be written.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise CheckpointError(
            "weights are imported by a single process: import them before init_process_group, or in a separate program"
        )
    unsupported = sorted(name for name, spec in source.tensors.items() if not is_storable(spec.dtype))
    if unsupported:
        raise CheckpointError(
            f"{unsupported[0]} is {source.tensors[unsupported[0]].dtype}, which the safetensors format lacks"
        )
    values = {name: encode(value, name) for name, value in source.values.items()}
    parts = [
        Part(prefix + name, spec.dtype, tuple(spec.shape), full_box(spec.shape))
        for name, spec in source.tensors.items()
    ]
    (files,) = assign_writes([parts], file_bytes)
    storage = open_storage(str(directory))
    if storage.names(directory_name(step)):
        raise CheckpointError(
            f"{storage.url}/{directory_name(step)} exists: give another step, existing checkpoints are never "
            "overwritten"
        )

    def runs(file: PlannedFile) -> Iterator[tuple[Any, list[int]]]:
        for part in file.parts:
            yield bytes_of(source.read(part.name.removeprefix(prefix))), [part.nbytes]

    def write(place: int, path: str, header: bytes) -> WrittenFile:
        return write_file(storage, path, header, runs(files[place]))

    origin = Origin(step, encode(dict(metadata or {}), "metadata"), {}, None)
    try:
        lock = DirectoryLock(storage)
        try:
            finish_moves(storage)
            write_checkpoint(Ranks(), storage, lock, WriteJob(origin, values, files, files, write))
        finally:
            lock.release()
    except OSError as error:
        raise CheckpointError(f"could not write to {storage.url}: {error}") from error
