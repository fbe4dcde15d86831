"""Texts out of a decoder: prompts in one forward, then one token per forward."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from titan_model.decoder import Decoder
from titan_model.generation.sampling import check_sampling, sample
from titan_model.layers.kv_cache import KVCache


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continue prompts, all of them in one batch.

    A row's tokens are those that it would get in a batch of its own (up to the rounding of logits) with the same row
    number: what is drawn is a function of (seed, row, position). A row that has ended takes no further part.

    Args:
        model: With all its weights on this process. Left as it was, its training flag included.
        prompts: Tokens: a sequence per row, of any lengths, or a tensor `[B, S]`. At least one token per row.
        max_new_tokens: How many to add to each row at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only so many of the likeliest tokens can be drawn; None is all.
        top_p: Only the likeliest tokens, as few as have this probability together, can be drawn; None is all.
        stop: Tokens that end a row (they are not returned).
        seed: Selects the draws.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: If prompts or settings do not fit the model, or each other.
    """
    check_sampling(temperature, top_k, top_p)
    prompts = _checked(model, prompts, max_new_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return texts
    device = model.embed.weight.device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    # Padding comes at the end, where no token looks; its keys are overwritten before any could.
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    cache = KVCache(model.layers, lengths, longest + max_new_tokens, device)
    live = list(range(len(prompts)))  # rows that have not ended
    with _evaluating(model):
        for _ in range(max_new_tokens):
            logits = model(tokens, cache=cache)[:, 0]
            drawn = sample(
                logits,
                cache.lengths,
                rows=torch.tensor(live, device=device),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
            )
            going = []
            for place, (row, token) in enumerate(zip(live, drawn.tolist(), strict=True)):
                if token not in stop:
                    texts[row].append(token)
                    going.append(place)
            if not going:
                break
            if len(going) < len(live):
                live = [live[place] for place in going]
                drawn = drawn[going]
                cache.keep(going)
            tokens = drawn[:, None]
    return texts


def _checked(model: Decoder, prompts: Tensor | Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Return the prompts as lists, or say what is wrong with them."""
    if new < 0:
        raise ValueError(f"max_new_tokens is {new}, must not be negative")
    if model.embed.weight.is_meta:
        raise ValueError("the model is on the meta device: give it memory (`to_empty`) and weights first")
    given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if any(isinstance(prompt, int) for prompt in given):
        raise ValueError("prompts are a list of token lists, or a tensor [B, S]: write [prompt] for a single one")
    rows = [list(prompt) for prompt in given]
    vocab, context = model.config.vocab_size, model.config.max_seq_len
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty: give at least one token, for example the tokenizer's bos")
        if not 0 <= min(row) <= max(row) < vocab:
            raise ValueError(
                f"prompt {i} has token {next(t for t in row if not 0 <= t < vocab)}; the model's are 0 to {vocab - 1}"
            )
        if len(row) + new > context:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, and {new} more would go beyond the model's context of {context} "
                "(max_seq_len): shorten the prompt or lower max_new_tokens"
            )
    return rows


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """Put every module into evaluation mode, then back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
