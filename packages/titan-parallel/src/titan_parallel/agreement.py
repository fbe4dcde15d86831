"""Whether all ranks were asked for the same, before they wait for one another in what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch.distributed as dist

from titan_parallel.errors import LayoutError

_SHOWN = 120  # characters of a value in a message


def check_agreement(asked: Mapping[str, object], group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks were asked for the same; all of them call this together.

    Args:
        asked: Names for the message, each with a value that ranks with equal ones write alike (`repr`).
        group: The ranks; the default process group if None.

    Raises:
        LayoutError: On all ranks, with what differs and the first rank whose is not that of the group's first.
    """
    size = dist.get_world_size(group)
    if size == 1 or dist.get_backend() == "fake":  # where there is nobody to ask
        return
    mine = {name: _short(repr(value)) for name, value in asked.items()}
    ranks: list[dict[str, str]] = [{} for _ in range(size)]
    dist.all_gather_object(ranks, mine, group=group)
    numbers = dist.get_process_group_ranks(group)
    first, wrong = ranks[0], []
    for name in dict.fromkeys(name for one in ranks for name in one):
        other = next((rank for rank, one in enumerate(ranks) if one.get(name) != first.get(name)), None)
        if other is not None:
            values = ((first.get(name), numbers[0]), (ranks[other].get(name), numbers[other]))
            wrong.append(f"{name} is {' and '.join(f'{value} on rank {number}' for value, number in values)}")
    if wrong:
        raise LayoutError(f"ranks were not asked for the same, and would wait for one another: {'; '.join(wrong)}")


def _short(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
