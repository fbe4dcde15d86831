"""Text out of a model, by plain recomputation (no key/value cache)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    forward: Callable[[Tensor], Tensor],
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

    Every call of `forward` sees a window of the same length, `context` (padded at the end, where a causal model
    cannot look), so that compiled and sequence-sharded models see one shape. All ranks of a sharded model must call
    this together, with equal arguments; they draw the same tokens.

    Args:
        forward: Maps tokens `[1, context]` to logits `[1, context, V]`.
        prompt: At least one token.
        max_new_tokens: How many to add at most.
        context: Length of the window, in tokens; older ones fall out of sight.
        temperature: Divides the logits; 0 takes the likeliest token.
        stop: A token that ends the text (it is not returned).
        seed: Selects the draws.
        device: Where `forward` wants its tokens.

    Returns:
        The new tokens.

    Raises:
        ValueError: If the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token, for example the tokenizer's bos")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = tokens[-context:]
        padded = torch.tensor([window + [0] * (context - len(window))], device=device)
        logits = forward(padded)[0, len(window) - 1].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
