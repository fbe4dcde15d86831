"""The write plan: which rank writes which slice of which tensor, and to which file.

Called by `snapshot` on rank 0 with what every rank holds, whenever the state's structure changes, and by the importer.
torch's distributed checkpoint plans with pickled objects, which takes seconds for thousands of tensors; these plans are
tuples, and are reused from save to save.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, cover_problem
from titan_ckpt.state.shards import Part

FILE_BYTES = 16 << 30  # a new file is begun when the next chunk would exceed this


@dataclass(frozen=True)
class PlannedFile:
    """A file that one rank writes.

    Attributes:
        name: The file's name.
        parts: Its content, in order.
    """

    name: str
    parts: tuple[Part, ...]


def assign_writes(held: Sequence[Sequence[Part]], file_bytes: int) -> list[list[PlannedFile]]:
    """Assign each slice to one of the ranks that hold it, and group each rank's slices into files.

    Where several ranks hold the same slice (replicas), the one with the least to write so far writes it. Slices that
    only one rank can write are assigned first, then the largest, so that the rest evens out the load.

    Args:
        held: What each rank holds.
        file_bytes: Approximate maximum file size; a single chunk may be larger.

    Returns:
        The files of each rank. Together they hold every slice once.

    Raises:
        CheckpointError: If the ranks' tensors do not fit together.
    """
    chosen = _boxes_to_write(held)
    holders: dict[tuple[str, Box], dict[int, Part]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            if part.box in chosen[part.name]:
                holders.setdefault((part.name, part.box), {})[rank] = part
    load = [0] * len(held)
    own: list[list[Part]] = [[] for _ in held]
    for ranks in sorted(holders.values(), key=lambda ranks: (len(ranks) > 1, -next(iter(ranks.values())).nbytes)):
        rank = min(ranks, key=lambda rank: load[rank])
        load[rank] += ranks[rank].nbytes
        own[rank].append(ranks[rank])
    order = {at: place for place, at in enumerate(holders)}
    # Wider dtypes first, so that every chunk is aligned; otherwise in the order of the state.
    own = [sorted(parts, key=lambda part: (-part.dtype.itemsize, order[part.name, part.box])) for parts in own]
    split = [list(_split_by_size(parts, file_bytes)) for parts in own]
    total, number = sum(len(files) for files in split), itertools.count()
    return [
        [PlannedFile(f"tensors-{next(number):05d}-of-{total:05d}.safetensors", tuple(parts)) for parts in files]
        for files in split
    ]


def _split_by_size(parts: Sequence[Part], file_bytes: int) -> Iterator[list[Part]]:
    file: list[Part] = []
    size = 0
    for part in parts:
        if file and size + part.nbytes > file_bytes:
            yield file
            file, size = [], 0
        file.append(part)
        size += part.nbytes
    if file:
        yield file


def _boxes_to_write(held: Sequence[Sequence[Part]]) -> dict[str, set[Box]]:
    """Choose, for each tensor, the slices that make it up.

    Normally these are all distinct slices. A weight tied across pipeline stages may be sharded differently on each
    stage; then the slices overlap, and those of one layout (the finest) are written, if each layout by itself is
    complete.

    Raises:
        CheckpointError: If dtypes or shapes differ between ranks, or the slices do not cover the tensor.
    """
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
    layouts: dict[str, dict[str, set[Box]]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            dtype, shape, first = kinds.setdefault(part.name, (part.dtype, part.shape, rank))
            if (dtype, shape) != (part.dtype, part.shape):
                raise CheckpointError(
                    f"tensor {part.name} is {part.dtype} {list(part.shape)} on rank {rank} but {dtype} {list(shape)} "
                    f"on rank {first}: a name must mean the same tensor on all ranks"
                )
            layouts.setdefault(part.name, {}).setdefault(part.layout, set()).add(part.box)
    chosen = {}
    for name, (_, shape, _) in kinds.items():
        chosen[name] = set().union(*layouts[name].values())
        problem = cover_problem(shape, list(chosen[name]))
        if problem is None:
            continue
        if any(cover_problem(shape, list(boxes)) for boxes in layouts[name].values()):
            raise CheckpointError(
                f"the ranks' shards do not make up tensor {name}, which {problem}: is it a DTensor on some ranks and a "
                "regular tensor on others, or does a rank that holds a part of it not save?"
            )
        chosen[name] = max(layouts[name].values(), key=len)
    return chosen
