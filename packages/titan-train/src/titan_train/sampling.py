"""Text out of a model in any layout, by computing the whole window for each token.

Sharded models keep no cache of keys and values: this is for looking at what a run has learnt. A model that is whole on
one process continues prompts faster with `titan_model.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import titan_model


@torch.no_grad()
def continue_prompt(
    predict: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    context: int,
    temperature: float = 1.0,
    stop: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Continue a prompt, one token at a time.

    Every call of `predict` sees a window of the same length, `context` (padded at the end, where a causal model cannot
    look), so that compiled and sequence-sharded models see one shape. All ranks of a sharded model must call this
    together, with equal arguments; they draw the same tokens.

    Args:
        predict: Maps tokens `[1, context]` to logits `[1, context, V]`.
        prompt: At least one token.
        max_new_tokens: How many to add at most.
        context: Length of the window, in tokens; older ones fall out of sight.
        temperature: Divides the logits; 0 takes the likeliest token.
        stop: A token that ends the text (it is not returned).
        seed: Selects the draws.
        device: Where `predict` wants its tokens.

    Returns:
        The new tokens.

    Raises:
        ValueError: If the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token, for example the tokenizer's bos")
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = tokens[-context:]
        padded = torch.tensor([window + [0] * (context - len(window))], device=device)
        logits = predict(padded)[:, len(window) - 1].float().cpu()
        position = torch.tensor([len(tokens)])
        token = int(titan_model.sample(logits, position, temperature=temperature, seed=seed))
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
