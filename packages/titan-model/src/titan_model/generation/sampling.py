"""The next token out of logits.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan_model.counter_rng import stream_key, uniform

_ROW = 1 << 32  # draws that belong to one row


def sample(
    logits: Tensor,
    positions: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw one token for each row.

    The draw is a function of (seed, row, position): neither torch's random state, the device nor the other rows of the
    batch have a part in it.

    Args:
        logits: `[B, V]`.
        positions: Integers `[B]`: where in its text each token will stand.
        rows: Integers `[B]`, from 0: the number of the row, if it is not its place in the batch.
        temperature: Divides the logits; 0 takes the likeliest token (the first of equals).
        top_k: Only so many of the likeliest tokens can be drawn; None is all.
        top_p: Only the likeliest tokens, as few as have this probability together, can be drawn, after `top_k`
            (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); None is all.
        seed: Selects the draws.

    Returns:
        int64 `[B]`.

    Raises:
        ValueError: If `temperature`, `top_k` or `top_p` is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    weights = (logits.double() / temperature).softmax(-1)
    order = None
    if top_k is not None or top_p is not None:
        weights, order = weights.sort(descending=True, stable=True)
    if top_k is not None:
        weights[:, top_k:] = 0
    if top_p is not None:
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= top_p * weights.sum(-1, keepdim=True), 0)
    heights = weights.cumsum(-1)
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    drawn = uniform(stream_key(seed, "sample"), rows * _ROW + positions)[:, None]
    # The first token that reaches the draw, which is never 0: one of no weight is no higher than the one before it.
    index = torch.searchsorted(heights, drawn * heights[:, -1:])
    return (index if order is None else order.gather(-1, index))[:, 0]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if a setting of `sample` is out of range; the message lists all that are."""
    wrong = []
    if not 0 <= temperature < float("inf"):
        wrong.append(f"temperature is {temperature}, must be 0 (the likeliest token) or positive")
    if top_k is not None and top_k < 1:
        wrong.append(f"top_k is {top_k}, must be at least 1 (or None for all)")
    if top_p is not None and not 0 < top_p <= 1:
        wrong.append(f"top_p is {top_p}, must be above 0 and at most 1 (or None for all)")
    if wrong:
        raise ValueError("sampling: " + "; ".join(wrong))
