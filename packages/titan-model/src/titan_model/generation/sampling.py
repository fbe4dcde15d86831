"""Drawing the next token from logits.

Called by `generation.generate` and by loops of other packages.

Shapes: `B` sequences, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_model.counter_rng import stream_key, uniform

_DRAWS_PER_SEQUENCE = 1 << 32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn from logits.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token (the first of equals).
        top_k: Draw from the `top_k` most likely tokens only; None: all.
        top_p: Draw from the smallest set of most likely tokens whose probability reaches `top_p`, after `top_k`
            (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); None: all.
        seed: Seed of the draws.

    Raises:
        ValueError: If `temperature`, `top_k` or `top_p` is out of range; the message lists all that are.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature is {self.temperature}, must be positive, or 0 for the most likely token")
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f"top_k is {self.top_k}, must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}, must be above 0 and at most 1, or None for all tokens")
        if wrong:
            raise ValueError("sampling: " + "; ".join(wrong))


_DEFAULT = SamplingParams()


def sample(
    logits: Tensor, positions: Tensor, params: SamplingParams | None = None, *, sequence_ids: Tensor | None = None
) -> Tensor:
    """Draw one token for each sequence.

    The draw is a function of (seed, sequence, position): it depends neither on torch's random state nor on the device
    nor on the other sequences of the batch.

    Args:
        logits: `[B, V]`.
        positions: Integers `[B]`: the position of each token in its sequence.
        params: How tokens are drawn; None draws from the full distribution, with seed 0.
        sequence_ids: Integers `[B]`, from 0: the number of each sequence, if it is not its index in the batch.

    Returns:
        int64 `[B]`.
    """
    params = params or _DEFAULT
    if params.temperature == 0:
        return logits.argmax(-1)
    weights = (logits.double() / params.temperature).softmax(-1)
    order = None
    if params.top_k is not None or params.top_p is not None:
        weights, order = weights.sort(descending=True, stable=True)
    if params.top_k is not None:
        weights[:, params.top_k :] = 0
    if params.top_p is not None:
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= params.top_p * weights.sum(-1, keepdim=True), 0)
    cumulative = weights.cumsum(-1)
    if sequence_ids is None:
        sequence_ids = torch.arange(len(logits), device=logits.device)
    drawn = uniform(stream_key(params.seed, "sample"), sequence_ids * _DRAWS_PER_SEQUENCE + positions)[:, None]
    # The first token whose cumulative weight reaches the draw. A token of weight 0 has the same cumulative weight as
    # the one before it, and the draw is never 0, so such a token is never chosen.
    index = torch.searchsorted(cumulative, drawn * cumulative[:, -1:])
    return (index if order is None else order.gather(-1, index))[:, 0]
