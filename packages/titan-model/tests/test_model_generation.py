"""Generation: what it shows the model, what it takes from the logits, and when it ends."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_model import Decoder, generate

PROMPTS = st.lists(st.integers(0, 36), min_size=1, max_size=10)
VOCAB = 10


class Counter:
    """A model of the sequence n, n + 1, n + 2, ... that keeps the windows it was shown."""

    def __init__(self) -> None:
        self.windows: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[0] == 1
        self.windows.append(tokens[0].tolist())
        return torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float() * 50


@settings(deadline=None, max_examples=20)
@given(prompt=PROMPTS, new=st.integers(0, 8), spare=st.integers(0, 5))
def test_greedy_is_the_likeliest_token_of_a_full_forward(
    random_decoder: Callable[..., Decoder], prompt: list[int], new: int, spare: int
) -> None:
    model = random_decoder()
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    got = generate(model, prompt, max_new_tokens=new, context=len(prompt) + new + spare, temperature=0)
    assert got == expected[len(prompt) :]


@settings(deadline=None, max_examples=20)
@given(prompt=PROMPTS, context=st.integers(1, 6))
def test_longer_than_the_context_only_the_last_tokens_are_seen(
    random_decoder: Callable[..., Decoder], prompt: list[int], context: int
) -> None:
    model = random_decoder()
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected[-context:]]))[0, -1].argmax()))
    assert generate(model, prompt, max_new_tokens=8, context=context, temperature=0) == expected[len(prompt) :]


@given(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), context=st.integers(1, 9))
def test_window_slides_and_keeps_its_length(prompt: list[int], context: int) -> None:
    model = Counter()
    out = generate(model, prompt, max_new_tokens=15, context=context, temperature=0)
    assert len(model.windows) == len(out) == 15
    assert all(after == (before + 1) % VOCAB for before, after in pairwise([prompt[-1], *out]))
    for i, window in enumerate(model.windows):
        seen = (prompt + out[:i])[-context:]
        assert len(window) == context
        assert window[: len(seen)] == seen


@given(stop=st.integers(0, VOCAB - 1), start=st.integers(0, VOCAB - 1), limit=st.integers(0, 20))
def test_stop_token_ends_the_text_and_is_left_out(stop: int, start: int, limit: int) -> None:
    out = generate(Counter(), [start], max_new_tokens=limit, context=4, temperature=0, stop=stop)
    until_stop = (stop - start - 1) % VOCAB
    assert out == [(start + 1 + i) % VOCAB for i in range(min(until_stop, limit))]


def test_seed_alone_decides_the_draws(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder()

    def draw(seed: int) -> list[int]:
        return generate(model, [1, 2, 3], max_new_tokens=20, context=24, temperature=1.0, seed=seed)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    texts = [draw(seed) for seed in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)  # the global generator is not read either
    assert [draw(seed) for seed in range(4)] == texts
    assert len({tuple(text) for text in texts}) == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_logits_at_the_temperature(temperature: float) -> None:
    n, logits = 4000, torch.tensor([2.0, 1.0, 0.0, -1.0, -50.0])
    drawn = generate(
        lambda tokens: logits.expand(1, tokens.shape[1], -1),
        [0],
        max_new_tokens=n,
        context=2,
        temperature=temperature,
    )
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / n
    expected = (logits / temperature).softmax(-1)
    assert bool(((shares - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-9).all())


def test_no_graph_is_built() -> None:
    seen = []

    def forward(tokens: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.zeros(1, tokens.shape[1], VOCAB)

    generate(forward, [1], max_new_tokens=2, context=4)
    assert seen == [False, False]


def test_prompt_is_left_alone_and_may_be_any_sequence() -> None:
    prompt = [1, 2]
    generate(Counter(), prompt, max_new_tokens=3, context=4, temperature=0)
    assert prompt == [1, 2]
    assert generate(Counter(), (1, 2), max_new_tokens=3, context=4, temperature=0) == [3, 4, 5]


def test_empty_prompt_is_refused() -> None:
    model = Counter()
    with pytest.raises(ValueError, match="prompt is empty: give at least one token"):
        generate(model, [], max_new_tokens=3, context=4)
    assert model.windows == []
