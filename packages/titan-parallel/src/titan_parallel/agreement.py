"""A check that all ranks got equal arguments, before a difference makes them wait for one another forever.

Called by `build_mesh`, `parallelize` and, in the first step, by `ParallelModel`; later steps are compared by `step`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from titan_parallel.errors import LayoutError

_SHOWN = 120  # characters of a value in a message


def check_agreement(asked: Mapping[str, object], group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks got equal arguments; all ranks of the group must call this together.

    Args:
        asked: Names for the message, each with a value; values with equal `repr` are equal.
        group: The ranks; the default process group if None.

    Raises:
        LayoutError: On all ranks, if values differ; the message names the first rank that differs from the first one.
    """
    size = dist.get_world_size(group)
    if size == 1 or dist.get_backend() == "fake":  # no other ranks, or no real ones
        return
    mine = {name: _short(repr(value)) for name, value in asked.items()}
    ranks: list[dict[str, str]] = [{} for _ in range(size)]
    dist.all_gather_object(ranks, mine, group=group)
    wrong = different(ranks, dist.get_process_group_ranks(group))
    if wrong:
        raise LayoutError(wrong)


def different(ranks: Sequence[Mapping[str, object]], numbers: Sequence[int]) -> str:
    """Return the message for values that differ between ranks, or nothing if all are equal.

    Args:
        ranks: What each rank got, by names for the message.
        numbers: Their numbers.
    """
    first, wrong = ranks[0], []
    for name in dict.fromkeys(name for one in ranks for name in one):
        other = next((rank for rank, one in enumerate(ranks) if one.get(name) != first.get(name)), None)
        if other is not None:
            values = ((first.get(name), numbers[0]), (ranks[other].get(name), numbers[other]))
            wrong.append(f"{name} is {' and '.join(f'{value} on rank {number}' for value, number in values)}")
    return f"ranks got different arguments and would wait for one another forever: {'; '.join(wrong)}" if wrong else ""


def _short(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
