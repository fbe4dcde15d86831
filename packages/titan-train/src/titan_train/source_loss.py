"""The loss of each source of a mixture, summed up where it arises and read only when it is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titan_model import LossSums


class SourceLosses:
    """Sums of cross-entropy and of scored tokens by source, on the device, since they were taken last.

    Args:
        names: Of the sources, in the same order on all ranks.
        device: Where the loss is computed.

    Attributes:
        count: How many sources are kept apart: 1 where there is but one, whose loss is the run's own.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.count = len(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        # Double, as millions of tokens are added up between two reports.
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    def ids(self, sources: Sequence[str]) -> Tensor:
        """Return int64 `[B]`, the numbers of the rows' sources. (A row of padding has none, and no scored token.)"""
        return torch.tensor([self._numbers.get(name, 0) for name in sources], dtype=torch.int64)

    def add(self, sums: LossSums, _: object) -> Tensor:
        """Add a microbatch's sums and return its whole loss: a loss function of `ParallelModel`. Waits for nothing."""
        if self.count > 1:
            self._sums[0] += sums.cross_entropy
            self._sums[1] += sums.scored
        return sums.total

    def take(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the mean over each source's scored tokens since the last call, over all ranks, and start anew.

        Args:
            sum_over_ranks: Adds up over all ranks that hold parts of the loss.

        Returns:
            In nats per token, without z-loss, by name; without the sources that had no scored token. Nothing at all
            where there is but one source.
        """
        if self.count == 1:
            return {}
        losses, scored = sum_over_ranks(self._sums).tolist()
        self._sums.zero_()
        return {name: losses[i] / scored[i] for name, i in self._numbers.items() if scored[i]}
