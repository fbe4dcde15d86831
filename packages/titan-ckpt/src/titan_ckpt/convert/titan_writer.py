"""Tensors of any source as a checkpoint of this package, written one at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_ckpt.collective import Ranks
from titan_ckpt.convert.source import Cast, TensorSource, Without
from titan_ckpt.convert.weight_map import Mapped, WeightMap
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import whole
from titan_ckpt.format.json_values import encode
from titan_ckpt.format.manifest import folder_name
from titan_ckpt.format.safetensors_header import bytes_of, is_storable
from titan_ckpt.save.file_writer import WrittenFile, write_file
from titan_ckpt.save.plan import FILE_BYTES, PlannedFile, divide
from titan_ckpt.save.writer import Order, Origin, write_checkpoint
from titan_ckpt.state.shards import Part
from titan_ckpt.storage.lock import FolderLock
from titan_ckpt.storage.open import open_storage


def import_weights(
    source: TensorSource,
    folder: str | Path,
    step: int = 0,
    weight_map: WeightMap | None = None,
    *,
    prefix: str = "model/",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Write weights of another program as a checkpoint, from which a run can then load its model.

    Args:
        source: the weights, see `open_source`.
        folder: the folder of checkpoints, as a path or URL; made if need be.
        step: the step of the checkpoint.
        weight_map: makes native tensors of foreign ones; None when names and shapes are the same.
        prefix: what to put before the tensors' names: the model's name in the state, and "/".
        dtype: the type to write floating-point weights in; None to leave them as they are.
        ignore: shell patterns of foreign names to pass over.

    Raises:
        CheckpointError: when the map does not fit the weights, the step is there already, or it cannot be written.
    """
    seen: TensorSource = Without(source, ignore)
    if weight_map is not None:
        seen = Mapped(seen, weight_map.rules, "to_native")
    if dtype is not None:
        seen = Cast(seen, dtype)
    write_titan(seen, folder, step, prefix=prefix)


def write_titan(
    source: TensorSource,
    folder: str | Path,
    step: int,
    *,
    prefix: str = "",
    metadata: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a source as the checkpoint of a step, one tensor at a time; done by one process alone.

    Args:
        source: the tensors and values.
        folder: the folder of checkpoints, as a path or URL; made if need be.
        step: the step.
        prefix: what to put before the tensors' names, e.g. `model/`.
        metadata: what else to keep with it, in JSON values.
        file_bytes: about how large a file may get.

    Raises:
        CheckpointError: when the step is there already, or it cannot be written.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise CheckpointError("one process makes a checkpoint of weights: do it before the ranks join, or apart")
    unfit = sorted(name for name, spec in source.tensors.items() if not is_storable(spec.dtype))
    if unfit:
        raise CheckpointError(f"{unfit[0]} is of {source.tensors[unfit[0]].dtype}, which safetensors cannot hold")
    values = {name: encode(value, name) for name, value in source.values.items()}
    parts = [
        Part(prefix + name, spec.dtype, tuple(spec.shape), whole(spec.shape)) for name, spec in source.tensors.items()
    ]
    (files,) = divide([parts], file_bytes)
    storage = open_storage(str(folder))
    if storage.names(folder_name(step)):
        raise CheckpointError(f"{storage.url}/{folder_name(step)} exists: nothing is overwritten, give another step")

    def runs(file: PlannedFile) -> Iterator[tuple[Any, list[int]]]:
        for part in file.parts:
            yield bytes_of(source.read(part.name.removeprefix(prefix))), [part.nbytes]

    def write(place: int, path: str, header: bytes) -> WrittenFile:
        return write_file(storage, path, header, runs(files[place]))

    origin = Origin(step, encode(dict(metadata or {}), "metadata"), {}, None)
    try:
        lock = FolderLock(storage)
        try:
            write_checkpoint(Ranks(), storage, lock, Order(origin, values, files, files, write))
        finally:
            lock.release()
    except OSError as error:
        raise CheckpointError(f"could not write to {storage.url}: {error}") from error
