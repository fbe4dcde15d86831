"""The output head: returns logits or, given labels, the loss without materializing all logits."""

from __future__ import annotations

from typing import overload

from torch import Tensor, nn

from titan_model.loss import LossSums, linear_cross_entropy


class Head(nn.Linear):
    """The linear map from the residual stream to the vocabulary.

    Args:
        dim: Width of the residual stream (`D`).
        vocab_size: Number of token ids (`V`).
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, labels: Tensor, *, source_ids: Tensor | None = ..., n_sources: int = ..., z_loss: float = ...
    ) -> LossSums: ...

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        source_ids: Tensor | None = None,
        n_sources: int = 1,
        z_loss: float = 0.0,
    ) -> Tensor | LossSums:
        """Return the logits `[B, S, V]` of `x` `[B, S, D]` or, given labels, the loss (see `linear_cross_entropy`)."""
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, labels, source_ids=source_ids, n_sources=n_sources, z_loss=z_loss)
