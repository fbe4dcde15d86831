"""What titan-train requires of the parts that it assembles: types that it declares as their consumer.

The loop is written against these. `packages/titan-train/tests/test_interfaces.py` runs titan-data against them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol, TypedDict

from torch import Tensor


class Batch(TypedDict):
    """This rank's sequences of one global batch: int64 CPU tensors `[B, S]`, and the sequences' sources.

    Attributes:
        tokens: Input of the model.
        labels: Targets at each position, already shifted; -100 is not scored.
        positions: Position within the document, from 0.
        document_ids: Number of the document within the sequence.
        sources: Name of each sequence's source, `B` of them.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    sources: list[str]


class BatchLoader(Protocol):
    """Iterator over global batches that yields this rank's sequences of each, with a state that all ranks share."""

    def __iter__(self) -> Iterator[Batch]:
        """Return itself."""
        ...

    def __next__(self) -> Batch:
        """Return this rank's sequences of the next global batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values, equal on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: Collection[str] = ()) -> None:
        """Continue from a position; data and settings may differ in what is allowed."""
        ...

    def accounting(self) -> dict[str, dict[str, int]]:
        """Return counts by source over all ranks: tokens, documents, epoch and others."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...
