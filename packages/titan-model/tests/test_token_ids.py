"""Tokens, labels and positions that the model has no place for are refused, in every layout and without waiting."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import titan_model
from ranks import Ranks
from titan_model import Decoder, KVCache, linear_cross_entropy
from titan_model.token_ids import check_range

VOCAB = 11
OUTSIDE = [-1, -2, -99, -101, VOCAB, VOCAB + 1, 70_000, -(2**31), 2**31 - 1]


def loss(labels: Tensor, weight: Tensor | None = None) -> Tensor:
    x = torch.randn(*labels.shape, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(1)) if weight is None else weight
    return linear_cross_entropy(x, weight, labels, chunk_tokens=2).total


@settings(deadline=None, max_examples=60)
@given(value=st.sampled_from(OUTSIDE) | st.integers(-(2**31), 2**31 - 1), place=st.integers(0, 9), wide=st.booleans())
def test_a_label_is_in_the_vocabulary_or_not_scored_or_refused(value: int, place: int, wide: bool) -> None:
    labels = torch.full((2, 5), 3, dtype=torch.int64 if wide else torch.int32)
    labels.view(-1)[place] = value
    if 0 <= value < VOCAB or value == -100:
        assert loss(labels).isfinite()
    else:
        with pytest.raises(ValueError, match=f"labels: {value} is not in 0 to {VOCAB - 1}; -100 marks"):
            loss(labels)


@pytest.mark.parametrize("labels", [torch.full((2, 5), 3.0), torch.ones(2, 5, dtype=torch.bool)])
def test_labels_are_integers(labels: Tensor) -> None:
    with pytest.raises(ValueError, match="labels: dtype is"):
        loss(labels)


def test_labels_have_the_shape_of_the_tokens() -> None:
    x, weight = torch.randn(2, 6, 8), torch.randn(VOCAB, 8)
    for shape in ((3, 4), (12,), (2, 7), (1, 6)):
        with pytest.raises(ValueError, match="labels: shape"):
            linear_cross_entropy(x, weight, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("value", OUTSIDE)
def test_a_token_outside_the_vocabulary_is_refused(random_decoder: Callable[..., Decoder], value: int) -> None:
    tokens = torch.tensor([[1, value, 2]])
    value = VOCAB if value == 70_000 else value
    with pytest.raises(ValueError, match=r"tokens: -?\d+ is not in 0 to 10"):
        random_decoder(vocab_size=VOCAB)(tokens)


def on_ranks(values: list[int]) -> list[str]:
    """Return what a head and an embedding, split over the vocabulary, say of each value."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    weight = distribute_tensor(torch.ones(VOCAB, 6), mesh, [Shard(0)])
    said = []
    for value in values:
        try:
            loss(torch.tensor([[1, value]]), weight)
            said.append("scored")
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_label_is_refused_where_the_vocabulary_is_split(ranks2: Ranks) -> None:
    # 5 and 6 are the last label of the first rank and the first of the second.
    for said in ranks2.run(on_ranks, [5, 6, -100, *OUTSIDE]):
        assert said[:3] == ["scored"] * 3
        for value, text in zip(OUTSIDE, said[3:], strict=True):
            assert text.startswith(f"labels: {value} is not in 0 to {VOCAB - 1}")


def decoder_on_ranks(value: int) -> list[str]:
    from titan_model import build, preset

    model = build(preset("debug"), "cpu")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    split = distribute_tensor(model.embed.weight.detach(), mesh, [Shard(0)])
    model.embed.register_parameter("weight", nn.Parameter(split))
    tokens = DTensor.from_local(torch.tensor([[1, value]]), mesh, run_check=False)
    said = []
    for given_tokens in (tokens, tokens.to_local()):
        try:
            model(given_tokens)
            said.append("embedded")
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_token_is_refused_where_the_embedding_is_split(ranks2: Ranks) -> None:
    # Split embeddings read zeros for it, on all ranks, without an error.
    for said in ranks2.run(decoder_on_ranks, 70_000):
        assert all(text.startswith("tokens: 70000 is not in 0 to 263") for text in said)


def test_positions_beyond_the_context_are_refused(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder(max_seq_len=8)
    tokens = torch.ones(2, 9, dtype=torch.int64)
    model(tokens[:, :8])
    with pytest.raises(ValueError, match=r"sequences of 9 exceed 8; .* change max_seq_len in its config"):
        model(tokens)
    for positions in (torch.arange(1, 9), torch.arange(-1, 7), torch.full((8,), 2**40)):
        with pytest.raises(ValueError, match=r"positions: -?\d+ is not in 0 to 7"):
            model(tokens[:, :8], positions=positions.expand(2, 8))
    packed = torch.arange(9) % 8
    assert (
        model(tokens, positions=packed.expand(2, 9), document_ids=(torch.arange(9) // 8).expand(2, 9)).isfinite().all()
    )


def test_a_cache_ends_with_the_context(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder(max_seq_len=8)
    cache = KVCache(model.layers, [7, 3], 20, "cpu")
    tokens = torch.ones(2, 7, dtype=torch.int64)
    with torch.no_grad():
        model(tokens, cache=cache)
        model(tokens[:, :1], cache=cache)
        with pytest.raises(ValueError, match="sequences of 9 exceed 8"):
            model(tokens[:, :1], cache=cache)


def test_a_cache_refuses_what_does_not_fit_and_stays_as_it_is(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder()
    for lengths, capacity in (([], 4), ([0, 2], 4), ([5], 4)):
        with pytest.raises(ValueError, match="prompt_lengths must be from 1 to the capacity 4"):
            KVCache(model.layers, lengths, capacity, "cpu")
    cache = KVCache(model.layers, [3, 2], 4, "cpu")
    ones = torch.ones(2, 5, dtype=torch.int64)

    def refused(tokens: Tensor, said: str) -> None:
        used, lengths = cache.used, cache.lengths.tolist()
        with torch.no_grad(), pytest.raises(ValueError, match=said):
            model(tokens, cache=cache)
        assert (cache.used, cache.lengths.tolist()) == (used, lengths)

    refused(ones[:1, :3], "holds 2 sequences, but tokens has 1")
    refused(ones[:, :2], "the longest prompt has 3 tokens, but tokens has 2")
    refused(ones, "5 tokens exceed its capacity of 4")
    with torch.no_grad():
        model(ones[:, :3], cache=cache)
        refused(ones[:, :2], "pass one token of each sequence at a time, not 2")
        model(ones[:, :1], cache=cache)
    refused(ones[:, :1], "5 tokens exceed its capacity of 4")


def test_no_promise_rests_on_an_assert() -> None:
    # `python -O` removes asserts. Those that remain tell the type checker that something is not None.
    for path in Path(titan_model.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                assert ast.unparse(node.test).endswith(" is not None"), f"{path}:{node.lineno}"


class Synchronizations(TorchDispatchMode):
    """Lists the operators that would make the host wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if any(word in func.name() for word in self.WAITING):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_check_does_not_wait_for_the_device() -> None:
    labels = torch.tensor([[3, -100, 10]])
    with Synchronizations() as seen:
        check_range("labels", labels, VOCAB, "", except_value=-100)
    assert seen.calls > 3
    assert seen.found == []


def test_compiled_code_refuses_too() -> None:
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    x, weight = torch.zeros(1, 2, 6), torch.zeros(VOCAB, 6)
    assert compiled(x, weight, torch.tensor([[3, -100]])).scored.item() == 1
    with pytest.raises(RuntimeError, match=f"labels: a value is not in 0 to {VOCAB - 1}"):
        compiled(x, weight, torch.tensor([[3, VOCAB]]))


def test_nothing_is_read_on_the_meta_device() -> None:
    check_range("labels", torch.full((2, 3), 70_000, device="meta"), VOCAB, "")
