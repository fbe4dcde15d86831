"""The language-model loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of the scored tokens, in fp32.

    A sum, not a mean: the caller divides by the scored tokens of the whole global batch, which only it knows.

    Args:
        logits: `[B, S, V]` of any float dtype; may be a DTensor sharded over `V`.
        labels: Integers `[B, S]`, already shifted; -100 is not scored.

    Returns:
        A scalar, in nats.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
