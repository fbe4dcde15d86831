"""What titan-train asks of what it assembles, declared here as the consumer's own types."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol, TypedDict

from torch import Tensor


class Batch(TypedDict):
    """This rank's rows of one global batch: int64 CPU tensors `[B, S]`, and the rows' sources.

    Attributes:
        tokens: What the model reads.
        labels: What it should predict at each place, already shifted; -100 is not scored.
        positions: Place within the document, from 0.
        document_ids: Which of the row's documents a token belongs to.
        sources: Name of each row's source, `B` of them.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    sources: list[str]


class BatchLoader(Protocol):
    """Global batches, this rank's rows of each, resumable by a small state that is equal on all ranks."""

    def __iter__(self) -> Iterator[Batch]:
        """Return itself."""
        ...

    def __next__(self) -> Batch:
        """Return this rank's rows of the next global batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: Collection[str] = ()) -> None:
        """Go on from a position, with data or settings that differ in what is allowed."""
        ...

    def accounting(self) -> dict[str, dict[str, int]]:
        """Return counts by source: tokens, documents, epoch and others, over all ranks."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...
