"""Text from a model in any layout: what the model is shown, and when the text ends."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import titan_model
from titan_train.sampling import Sampling, continue_prompt

VOCAB = 10


class Counter:
    """A model of the sequence n, n + 1, n + 2, ... that keeps the windows it was shown."""

    def __init__(self) -> None:
        self.windows: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[0] == 1
        assert not torch.is_grad_enabled()
        self.windows.append(tokens[0].tolist())
        return torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float() * 50


@settings(deadline=None, max_examples=10)
@given(prompt=st.lists(st.integers(0, 36), min_size=1, max_size=10), spare=st.integers(0, 5))
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_within_the_context_it_equals_generate(prompt: list[int], spare: int, temperature: float) -> None:
    config = titan_model.DecoderConfig(
        vocab_size=37, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16, max_seq_len=64, init_std=0.5
    )
    model = titan_model.build(config, "cpu")
    titan_model.init_parameters(model.named_parameters(), config, seed=3)
    context = len(prompt) + 8 + spare
    text = continue_prompt(model, prompt, Sampling(max_new_tokens=8, context=context, temperature=temperature, seed=5))
    params = titan_model.SamplingParams(temperature=temperature, seed=5)
    assert [text] == titan_model.generate(model, [prompt], params, max_new_tokens=8)


@given(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), context=st.integers(1, 9))
def test_window_slides_and_keeps_its_length(prompt: list[int], context: int) -> None:
    model = Counter()
    text = continue_prompt(model, prompt, Sampling(max_new_tokens=15, context=context, temperature=0))
    assert len(model.windows) == len(text) == 15
    assert all(after == (before + 1) % VOCAB for before, after in pairwise([prompt[-1], *text]))
    for i, window in enumerate(model.windows):
        seen = (prompt + text[:i])[-context:]
        assert len(window) == context
        assert window[: len(seen)] == seen


@given(stop=st.integers(0, VOCAB - 1), start=st.integers(0, VOCAB - 1), limit=st.integers(0, 20))
def test_stop_token_ends_the_text_and_is_left_out(stop: int, start: int, limit: int) -> None:
    text = continue_prompt(Counter(), (start,), Sampling(max_new_tokens=limit, context=4, temperature=0, stop=stop))
    until_stop = (stop - start - 1) % VOCAB
    assert text == [(start + 1 + i) % VOCAB for i in range(min(until_stop, limit))]


def test_seed_alone_decides_the_draws() -> None:
    def draw(seed: int) -> tuple[int, ...]:
        flat = torch.zeros(1, 4, VOCAB)
        return tuple(continue_prompt(lambda tokens: flat, [1], Sampling(max_new_tokens=20, context=4, seed=seed)))

    texts = [draw(seed) for seed in range(4)]
    torch.manual_seed(1)  # the global generator is not read
    assert [draw(seed) for seed in range(4)] == texts
    assert len(set(texts)) == 4


def test_empty_prompt_is_refused() -> None:
    model = Counter()
    with pytest.raises(ValueError, match="prompt is empty: give at least one token"):
        continue_prompt(model, [], Sampling(max_new_tokens=3, context=4))
    assert model.windows == []
