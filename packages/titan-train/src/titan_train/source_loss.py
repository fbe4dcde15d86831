"""The loss of each source of a mixture, summed on the device and read only when it is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titan_model import LossSums


class SourceLosses:
    """Sums of cross-entropy and of scored tokens by source, on the device, since the last `take`.

    Args:
        names: Names of the sources, in the same order on all ranks.
        device: Device that computes the loss.

    Attributes:
        count: Number of sources. With one source nothing is summed: its loss is the run's.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.count = len(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        # Double precision: millions of tokens are added between two reports.
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    def ids(self, sources: Sequence[str]) -> Tensor:
        """Return int64 `[B]`, the number of each sequence's source; 0 for padding, which has no scored token."""
        return torch.tensor([self._numbers.get(name, 0) for name in sources], dtype=torch.int64)

    def add(self, sums: LossSums, _: object) -> Tensor:
        """Add a microbatch's sums and return its loss, without waiting: a loss function for `ParallelModel`."""
        if self.count > 1:
            self._sums[0] += sums.cross_entropy
            self._sums[1] += sums.scored
        return sums.total

    def take(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return each source's mean loss over its scored tokens since the last call, over all ranks, and reset.

        Args:
            sum_over_ranks: Sums over all ranks that hold parts of the loss.

        Returns:
            Loss by source name, in nats per token, without z-loss. Sources without a scored token are left out. Empty
            if there is only one source.
        """
        if self.count == 1:
            return {}
        losses, scored = sum_over_ranks(self._sums).tolist()
        self._sums.zero_()
        return {name: losses[i] / scored[i] for name, i in self._numbers.items() if scored[i]}
