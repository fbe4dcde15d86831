"""Generation with a key/value cache equals generation without, `transformers`, and each sequence generated alone."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model_families import FAMILIES, randomize, to_transformers, transformers_model
from titan_model import Decoder, DynamicScaling, LongRopeScaling, SamplingParams, build, generate
from titan_model.config import AttentionKind
from titan_model.layers.kv_cache import KVCache

PROMPTS = st.lists(st.lists(st.integers(0, 36), min_size=1, max_size=10), min_size=1, max_size=4)
UNEQUAL = [[5, 9, 2, 33, 7, 7, 1], [4], [30, 11, 12]]


def family_model(family: str, **changes: Any) -> Decoder:
    model = build(replace(FAMILIES[family], **changes), "cpu")
    randomize(model)
    return model


def uncached(model: Decoder, prompt: Sequence[int], new: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@settings(deadline=None, max_examples=20)
@given(prompts=PROMPTS, new=st.integers(0, 8))
def test_greedy_is_the_likeliest_token_of_a_full_forward(
    random_decoder: Callable[..., Decoder], prompts: list[list[int]], new: int
) -> None:
    model = random_decoder()
    texts = generate(model, prompts, SamplingParams(temperature=0), max_new_tokens=new)
    assert texts == [uncached(model, prompt, new) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers(family: str) -> None:
    pytest.importorskip("transformers")
    new = 50  # beyond the original context of the scaled ones
    model = family_model(family)
    theirs = transformers_model(model.config)
    theirs.load_state_dict(to_transformers(model.state_dict(), model.config), strict=False)
    theirs.tie_weights()
    longest = max(map(len, UNEQUAL))
    texts = generate(model, UNEQUAL, SamplingParams(temperature=0), max_new_tokens=new)
    assert len({tuple(text) for text in texts}) == len(UNEQUAL)
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.depends_on_length:
        # There the length is that of the batch, and a cache keeps keys that were rotated for shorter texts.
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "use_cache": False}
        alone = [theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :] for prompt in UNEQUAL]
        assert texts == [text.tolist() for text in alone]
        return
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in UNEQUAL])
    there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in UNEQUAL])
    expected = theirs.generate(
        padded, attention_mask=there, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert texts == expected[:, longest:].tolist()


CACHED = [
    *((family, kind) for family in ("llama-tied-scaled", "qwen3", "qwen3-moe") for kind in get_args(AttentionKind)),
    *((family, "auto") for family in ("mistral", "qwen2-window", "smollm3", "granite", "phi3")),
]


@pytest.mark.parametrize(("family", "attention"), CACHED)
def test_cached_logits_are_those_of_a_full_forward(family: str, attention: str) -> None:
    model = family_model(family, attention=attention)
    whole = [torch.randint(0, 37, (n + 6,), generator=torch.Generator().manual_seed(n)) for n in (29, 1, 3)]
    lengths = [len(tokens) - 6 for tokens in whole]
    cache = KVCache(model.layers, lengths, 35, "cpu")
    with torch.no_grad():
        full = [model(tokens[None])[0] for tokens in whole]
        new = nn.utils.rnn.pad_sequence([t[:n] for t, n in zip(whole, lengths, strict=True)], batch_first=True)
        for step in range(7):
            logits = model(new, cache=cache)
            assert logits.shape == (3, 1, 37)
            for row, n in enumerate(lengths):
                torch.testing.assert_close(logits[row, 0], full[row][n + step - 1], rtol=0, atol=1e-5)
            if step < 6:
                new = torch.stack([t[n + step] for t, n in zip(whole, lengths, strict=True)])[:, None]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_sequence_does_not_depend_on_the_others(random_decoder: Callable[..., Decoder], temperature: float) -> None:
    model = random_decoder()
    together = generate(model, UNEQUAL, SamplingParams(temperature=temperature), max_new_tokens=20)
    for row in range(3):
        others = [[1] * (row + 3) for _ in range(3)]
        others[row] = UNEQUAL[row]
        assert generate(model, others, SamplingParams(temperature=temperature), max_new_tokens=20)[row] == together[row]


def test_a_text_goes_on_as_it_would_have(random_decoder: Callable[..., Decoder]) -> None:
    # The draw belongs to the position in the text, not to the call.
    model = random_decoder()
    whole = generate(model, UNEQUAL, max_new_tokens=20)
    longer = [prompt + text[:7] for prompt, text in zip(UNEQUAL, whole, strict=True)]
    assert generate(model, longer, max_new_tokens=13) == [text[7:] for text in whole]


def test_seed_alone_decides_the_draws(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder()

    def draw(seed: int) -> list[list[int]]:
        return generate(model, [[1, 2, 3]] * 2, SamplingParams(seed=seed), max_new_tokens=20)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    texts = [draw(seed) for seed in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)  # the global generator is not read either
    assert [draw(seed) for seed in range(4)] == texts
    assert len({tuple(text) for rows in texts for text in rows}) == 8  # equal prompts differ too


@settings(deadline=None, max_examples=20)
@given(stop=st.sets(st.integers(0, 36), max_size=12), limit=st.integers(0, 12))
def test_stop_tokens_end_only_their_sequence_and_are_not_returned(
    random_decoder: Callable[..., Decoder], stop: set[int], limit: int
) -> None:
    model = random_decoder()
    free = generate(model, UNEQUAL, max_new_tokens=limit)
    expected = []
    for text in free:
        ends = [i for i, token in enumerate(text) if token in stop]
        expected.append(text[: ends[0]] if ends else text)
    assert generate(model, UNEQUAL, max_new_tokens=limit, stop=stop) == expected


def test_sequences_that_have_ended_are_not_computed(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder()
    free = generate(model, UNEQUAL, SamplingParams(temperature=0), max_new_tokens=12)
    stop = free[0][4]
    shapes: list[tuple[int, ...]] = []
    model.embed.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    texts = generate(model, UNEQUAL, SamplingParams(temperature=0), max_new_tokens=12, stop=[stop])
    assert min(map(len, texts)) < 12
    alive = [sum(len(text) >= step for text in texts) for step in range(1, 12)]
    assert shapes == [(3, 7), *[(n, 1) for n in alive if n]]


def test_keys_and_values_keep_their_heads(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder(n_kv_heads=1).bfloat16()
    cache = KVCache(model.layers, [3, 2], 9, "cpu")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3], [4, 5, 0]]), cache=cache)
    for layer in cache.layers.values():
        tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
        assert [(t.shape, t.dtype) for t in tensors] == [((2, 1, 9, 8), torch.bfloat16)] * 2


@settings(deadline=None, max_examples=15)
@given(prompts=PROMPTS, window=st.integers(1, 12), full=st.sets(st.integers(0, 1)))
def test_windows_need_no_more_than_their_slots(
    random_decoder: Callable[..., Decoder], prompts: list[list[int]], window: int, full: set[int]
) -> None:
    model = random_decoder(window=window, full_layers=tuple(full))
    cache = KVCache(model.layers, [len(prompt) for prompt in prompts], 20, "cpu")
    longest = max(map(len, prompts))
    new = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    texts = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for _ in range(8):
            logits = model(new, cache=cache)[:, 0]
            for text, found in zip(texts, logits, strict=True):
                torch.testing.assert_close(found, model(torch.tensor([text]))[0, -1], rtol=0, atol=1e-4)
                text.append(int(found.argmax()))
            new = torch.tensor([text[-1:] for text in texts])
    for name, layer in cache.layers.items():
        slots = 20 if int(name) in full else min(window, 20)
        assert {tensor.shape[2] for tensor in vars(layer).values() if isinstance(tensor, Tensor)} == {slots}


@pytest.mark.parametrize(
    "scaling",
    [
        DynamicScaling(factor=4.0, original_context=9),
        LongRopeScaling(short_factor=(1.0,) * 4, long_factor=(1, 2, 3, 4), original_context=9, factor=4.0),
    ],
    ids=["dynamic", "longrope"],
)
@pytest.mark.parametrize("window", [None, 4])
def test_a_scaling_by_length_is_that_of_the_text_so_far(
    random_decoder: Callable[..., Decoder], scaling: DynamicScaling | LongRopeScaling, window: int | None
) -> None:
    model = random_decoder(rope_scaling=scaling, window=window)
    texts = generate(model, UNEQUAL, SamplingParams(temperature=0), max_new_tokens=16)
    assert texts == [uncached(model, prompt, 16) for prompt in UNEQUAL]
    # In a loop of one's own a cache that is out of date is an error, not a wrong text.
    cache = KVCache(model.layers, [8, 9], 20, "cpu")
    with torch.no_grad():
        model(torch.ones(2, 9, dtype=torch.int64), cache=cache)
        assert cache.is_outdated(model.config)
        with pytest.raises(ValueError, match="begin a new cache with the full texts"):
            model(torch.ones(2, 1, dtype=torch.int64), cache=cache)
        cache.keep([0])
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)


def test_bfloat16_generates(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder().bfloat16()
    texts = generate(model, UNEQUAL, SamplingParams(temperature=0), max_new_tokens=8)
    alone = [generate(model, [prompt], SamplingParams(temperature=0), max_new_tokens=8)[0] for prompt in UNEQUAL]
    assert [text[0] for text in texts] == [text[0] for text in alone]
    assert [len(text) for text in texts] == [8, 8, 8]


def test_a_tensor_of_prompts_will_do(random_decoder: Callable[..., Decoder]) -> None:
    model, prompts = random_decoder(), [[1, 2, 3], [4, 5, 6]]
    assert generate(model, torch.tensor(prompts), max_new_tokens=5) == generate(model, prompts, max_new_tokens=5)
    assert prompts == [[1, 2, 3], [4, 5, 6]]
    assert generate(model, [], max_new_tokens=5) == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(random_decoder: Callable[..., Decoder], fails: bool) -> None:
    model = random_decoder()
    model.layers["1"].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen: list[tuple[bool, bool]] = []

    def look(module: nn.Module, args: object) -> None:
        seen.append((torch.is_grad_enabled(), any(m.training for m in model.modules())))
        if fails:
            raise RuntimeError("stumbled")

    model.layers["0"].register_forward_pre_hook(look)
    if fails:
        with pytest.raises(RuntimeError, match="stumbled"):
            generate(model, [[1]], max_new_tokens=2)
    else:
        generate(model, [[1]], max_new_tokens=2)
    assert set(seen) == {(False, False)}
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.slow
def test_compiled_blocks_generate_the_same(random_decoder: Callable[..., Decoder]) -> None:
    plain, compiled = random_decoder(), random_decoder()
    torch._dynamo.reset()
    for block in compiled.layers.values():
        block.compile(backend="eager", fullgraph=True)
    wanted = generate(plain, UNEQUAL, max_new_tokens=20, stop=[plain.config.vocab_size - 1])
    assert generate(compiled, UNEQUAL, max_new_tokens=20, stop=[plain.config.vocab_size - 1]) == wanted


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty: give at least one token"),
        ([1, 2], {}, r"write \[prompt\] for a single one"),
        (torch.tensor([1, 2]), {}, r"write \[prompt\] for a single one"),
        ([[1], [3, 37]], {}, "prompt 1 has token 37, outside the model's vocabulary of 0 to 36"),
        ([[-1]], {}, "prompt 0 has token -1"),
        ([[1] * 60], {"max_new_tokens": 5}, r"60 tokens, and 5 more exceed .* context of 64 \(max_seq_len\)"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    random_decoder: Callable[..., Decoder], prompts: Any, options: dict[str, Any], message: str
) -> None:
    model = random_decoder()
    model.embed.register_forward_pre_hook(lambda *_: sys.exit("computed"))
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 3, **options})


def test_the_whole_context_can_be_used(random_decoder: Callable[..., Decoder]) -> None:
    assert len(generate(random_decoder(), [[1] * 60], max_new_tokens=4)[0]) == 4


def test_a_model_without_weights_is_refused(random_decoder: Callable[..., Decoder]) -> None:
    with pytest.raises(ValueError, match="meta device: call `to_empty`"):
        generate(build(random_decoder().config, "meta"), [[1]], max_new_tokens=1)
