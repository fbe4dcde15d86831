"""Text generation with a model in any layout, which computes the full window again for each token.

Sharded models have no KV cache: this is for a look at what a run has learned. For a model on one process
`titan_model.generate` is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import titan_model
from titan_train.assembly import Run

_SAMPLE_CONTEXT = 128  # tokens: enough to see words in, short enough for a CPU


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: Largest number of tokens to add.
        context: Length of the window in tokens; older tokens are dropped.
        temperature: Divides the logits; 0 takes the most likely token.
        stop: A token that ends the text (it is not returned), or None.
        seed: Seed of the draws.
    """

    max_new_tokens: int
    context: int
    temperature: float = 1.0
    stop: int | None = None
    seed: int = 0


@torch.no_grad()
def continue_prompt(
    predict: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Continue a prompt, one token at a time.

    Every call of `predict` sees a window of the same length, `context` (padded at the end, where a causal model does
    not look), so that compiled and sequence-sharded models see one shape. All ranks of a sharded model must call this
    together with equal arguments; they draw the same tokens.

    Args:
        predict: Maps tokens `[1, context]` to logits `[1, context, V]`.
        prompt: At least one token.
        sampling: Length, window, temperature and seed.
        device: Device on which `predict` expects its tokens.

    Returns:
        The new tokens.

    Raises:
        ValueError: If the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token, such as the tokenizer's bos")
    params = titan_model.SamplingParams(temperature=sampling.temperature, seed=sampling.seed)
    tokens = list(prompt)
    for _ in range(sampling.max_new_tokens):
        window = tokens[-sampling.context :]
        padded = torch.tensor([window + [0] * (sampling.context - len(window))], device=device)
        logits = predict(padded)[:, len(window) - 1].float().cpu()
        position = torch.tensor([len(tokens)])
        token = int(titan_model.sample(logits, position, params))
        if token == sampling.stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def sample(run: Run) -> str | None:
    """Return the continuation of the prompt of `[sample]`, or None if no text is wanted. Call it on all ranks."""
    wanted = run.config.sample
    if wanted.tokens == 0:
        return None
    tp = run.model.mesh["tp"].size()
    sampling = Sampling(
        max_new_tokens=wanted.tokens,
        context=min(run.config.training.seq_len, _SAMPLE_CONTEXT) // tp * tp,  # a split sequence must divide
        temperature=wanted.temperature,
        stop=run.tokenizer.eos_id,
        seed=run.config.run.seed,
    )
    bos = [run.tokenizer.bos_id] if run.tokenizer.bos_id is not None else []
    prompt = [*bos, *run.tokenizer.encode(wanted.prompt)]
    return run.tokenizer.decode(continue_prompt(run.model.predict, prompt, sampling, device=run.process.device))
