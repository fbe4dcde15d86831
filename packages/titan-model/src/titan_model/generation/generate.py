"""Text generation with a key/value cache: all prompts in one forward, then one token of each sequence per forward.

The public entry point `generate`; each token is drawn by `generation.sampling.sample`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from titan_model.decoder import Decoder
from titan_model.generation.sampling import SamplingParams, sample
from titan_model.layers.kv_cache import KVCache


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Tensor | Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Continue prompts, all of them in one batch.

    A sequence's tokens do not depend on the rest of the batch (up to the rounding of logits): each draw is a function
    of (seed, index of the sequence, position). A sequence that has ended is dropped from the batch.

    Args:
        model: The model, unsharded in this process. It is left unchanged, its training mode included.
        prompts: Tokens: a list of sequences of any lengths, or a tensor `[B, S]`. At least one token per sequence.
        params: How tokens are drawn; None draws from the full distribution, with seed 0.
        max_new_tokens: Maximum number of tokens to add to each sequence.
        stop: Tokens that end a sequence (they are not returned).

    Returns:
        The new tokens of each sequence.

    Raises:
        ValueError: If a prompt is empty, has tokens outside the vocabulary, or exceeds the model's context together
            with `max_new_tokens`; or if the model is on the meta device.

    Example:
        >>> from titan_model import SamplingParams, build, generate, init_parameters, preset
        >>> config = preset("debug")
        >>> model = build(config, device="cpu")
        >>> init_parameters(model.named_parameters(), config, seed=0)
        >>> texts = generate(model, [[1, 2, 3], [4]], SamplingParams(temperature=0.8, top_k=20), max_new_tokens=5)
        >>> [len(text) for text in texts]
        [5, 5]
    """
    sequences = _check_prompts(model, prompts, max_new_tokens)
    texts: list[list[int]] = [[] for _ in sequences]
    if not sequences:
        return texts
    device = model.embed.weight.device
    lengths = [len(sequence) for sequence in sequences]
    capacity = max(lengths) + max_new_tokens
    cache = KVCache(model.layers, lengths, capacity, device)
    tokens = _pad(sequences, device)
    active = list(range(len(sequences)))  # sequences that have not ended
    with _evaluation_mode(model):
        for _ in range(max_new_tokens):
            logits = model(tokens, cache=cache)[:, 0]
            drawn = sample(logits, cache.lengths, params, sequence_ids=torch.tensor(active, device=device))
            new = drawn.tolist()
            kept = [index for index, token in enumerate(new) if token not in stop]
            for index in kept:
                texts[active[index]].append(new[index])
            if not kept:
                break
            if len(kept) < len(active):
                active = [active[index] for index in kept]
                drawn = drawn[kept]
                cache.keep(kept)
            tokens = drawn[:, None]
            if cache.is_outdated(model.config):  # a scaling by length: all tokens are computed anew
                full = [sequences[index] + texts[index] for index in active]
                tokens, cache = _pad(full, device), KVCache(model.layers, [*map(len, full)], capacity, device)
    return texts


def _check_prompts(model: Decoder, prompts: Tensor | Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the prompts as lists, or raise ValueError if one does not fit the model."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must not be negative")
    if model.embed.weight.is_meta:
        raise ValueError("the model is on the meta device: call `to_empty`, then initialize or load its weights first")
    given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if any(isinstance(prompt, int) for prompt in given):
        raise ValueError("prompts must be a list of token lists, or a tensor [B, S]: write [prompt] for a single one")
    sequences = [list(prompt) for prompt in given]
    vocab, context = model.config.vocab_size, model.config.max_seq_len
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise ValueError(f"prompt {i} is empty: give at least one token, for example the tokenizer's bos")
        if not 0 <= min(sequence) <= max(sequence) < vocab:
            wrong = next(token for token in sequence if not 0 <= token < vocab)
            raise ValueError(f"prompt {i} has token {wrong}, outside the model's vocabulary of 0 to {vocab - 1}")
        if len(sequence) + max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(sequence)} tokens, and {max_new_tokens} more exceed the model's context of "
                f"{context} (max_seq_len): shorten the prompt or lower max_new_tokens"
            )
    return sequences


def _pad(sequences: list[list[int]], device: torch.device) -> Tensor:
    """Return tokens `[B, S]`, padded at the end.

    No token attends to padding, and its keys are overwritten before a later token could.
    """
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], device=device)


@contextmanager
def _evaluation_mode(model: Decoder) -> Iterator[None]:
    """Set every module to evaluation mode, then restore the mode of each."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
