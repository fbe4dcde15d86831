"""Which rank writes which part of which tensor, and into which file.

Every rank tells what it holds. Where several hold the same part (replicas), the one with the least to write so far
writes it. The plans of torch's distributed checkpoint are objects to be pickled and cost seconds for thousands of
tensors; these are tuples, and are kept from one save to the next while the state keeps its form.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, flaw_in_cover
from titan_ckpt.state.shards import Part

FILE_BYTES = 16 << 30  # a file is closed when the next chunk would take it beyond this


@dataclass(frozen=True)
class PlannedFile:
    """A file that one rank writes.

    Attributes:
        name: the file's.
        parts: what is in it, in order.
    """

    name: str
    parts: tuple[Part, ...]


def divide(held: Sequence[Sequence[Part]], file_bytes: int) -> list[list[PlannedFile]]:
    """Decide which rank writes what.

    Args:
        held: what each rank holds.
        file_bytes: about how large a file may get; one chunk may be larger.

    Returns:
        The files of each rank; all of them together hold every part once.

    Raises:
        CheckpointError: when the ranks' tensors do not fit together.
    """
    chosen = _boxes_to_write(held)
    holders: dict[tuple[str, Box], dict[int, Part]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            if part.box in chosen[part.name]:
                holders.setdefault((part.name, part.box), {})[rank] = part
    load = [0] * len(held)
    own: list[list[Part]] = [[] for _ in held]
    # Those that only one rank can write first, then the largest: the rest evens out what differs.
    for ranks in sorted(holders.values(), key=lambda ranks: (len(ranks) > 1, -next(iter(ranks.values())).nbytes)):
        rank = min(ranks, key=lambda rank: load[rank])
        load[rank] += ranks[rank].nbytes
        own[rank].append(ranks[rank])
    order = {at: place for place, at in enumerate(holders)}
    # Wider types first, so that every chunk is aligned; else as the state has them.
    own = [sorted(parts, key=lambda part: (-part.dtype.itemsize, order[part.name, part.box])) for parts in own]
    split = [list(_filed(parts, file_bytes)) for parts in own]
    total, number = sum(len(files) for files in split), itertools.count()
    return [
        [PlannedFile(f"tensors-{next(number):05d}-of-{total:05d}.safetensors", tuple(parts)) for parts in files]
        for files in split
    ]


def _filed(parts: Sequence[Part], file_bytes: int) -> Iterator[list[Part]]:
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
    """Return, for each tensor, the parts that make it up; refuse what makes up none."""
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
    cuts: dict[str, dict[str, set[Box]]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            dtype, shape, first = kinds.setdefault(part.name, (part.dtype, part.shape, rank))
            if (dtype, shape) != (part.dtype, part.shape):
                raise CheckpointError(
                    f"the tensor {part.name} is {part.dtype} {list(part.shape)} on rank {rank} and {dtype} "
                    f"{list(shape)} on rank {first}: a name means one tensor on all ranks"
                )
            cuts.setdefault(part.name, {}).setdefault(part.cut, set()).add(part.box)
    chosen = {}
    for name, (_, shape, _) in kinds.items():
        chosen[name] = set().union(*cuts[name].values())
        flaw = flaw_in_cover(shape, list(chosen[name]))
        if flaw is None:
            continue
        # A weight tied across pipeline stages may be cut otherwise in each: then one cut is written, the finest.
        if any(flaw_in_cover(shape, list(boxes)) for boxes in cuts[name].values()):
            raise CheckpointError(
                f"the ranks' parts do not make up the tensor {name}, which {flaw}. Is it a DTensor on some ranks and "
                "plain on others, or does a rank that holds a part of it not save?"
            )
        chosen[name] = max(cuts[name].values(), key=len)
    return chosen
