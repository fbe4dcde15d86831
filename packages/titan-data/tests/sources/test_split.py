"""Documents that are held out: by what they contain, on one side only, and never seen by training."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_flat import flat_loader
from data_loader_cases import ListStream
from titan_data import ByteTokenizer, DataError, ListSource, MixtureSource, TokenShards, hold_out, prepare
from titan_data.sources.base import RandomAccessSource, StreamSource, TokenSource

TEXTS = [f"document {i} " * (1 + i % 5) for i in range(400)]


def split_of(source: Any, share: float) -> Any:
    """Both sides, which have the members of the source's own kind."""
    return hold_out(source, share)


def documents(source: Any) -> list[Any]:
    if isinstance(source, StreamSource):
        return [text for shard in range(source.shards) for text in source.iterate(shard, 0)]
    if isinstance(source, TokenSource):
        return [bytes(source[i].tolist()[1:-1]).decode() for i in range(len(source))]
    return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "shards"
    prepare(ListSource(TEXTS), ByteTokenizer(), folder, workers=0, shard_tokens=2000)
    return folder


@pytest.fixture(params=["texts", "stream", "tokens"])
def source(request: pytest.FixtureRequest, shards: Path) -> Any:
    if request.param == "texts":
        return ListSource(TEXTS, "corpus")
    return TokenShards(shards) if request.param == "tokens" else ListStream([TEXTS[i::3] for i in range(3)], "corpus")


def test_each_document_is_on_one_side(source: Any) -> None:
    split = split_of(source, 0.2)
    sides = [documents(side) for side in split]
    assert all(bool(one) != bool(other) for one, other in zip(*sides, strict=True))
    assert ["".join(both) for both in zip(*sides, strict=True)] == documents(source)
    assert 50 < sum(map(bool, sides[1])) < 110  # 80 of 400 on average
    assert [side.name for side in split] == [source.name, f"{source.name} held out"]
    for kind in (RandomAccessSource, TokenSource, StreamSource):
        assert all(isinstance(side, kind) == isinstance(source, kind) for side in split)


def test_training_never_sees_what_is_held_out(source: Any) -> None:
    training, held_out = split_of(source, 0.2)
    seen: dict[str, set[str]] = {}
    for name, side in (("training", training), ("held out", held_out)):
        loader = flat_loader([MixtureSource(side, max_epochs=2)], ByteTokenizer(), seq_len=512, global_batch_size=1)
        tokens = [token for batch in loader for token in batch["tokens"].flatten().tolist()]
        seen[name] = {bytes(part).decode() for part in _documents_in(tokens)}
    assert seen["training"].isdisjoint(seen["held out"])
    assert seen["training"] | seen["held out"] == set(TEXTS)


def _documents_in(tokens: list[int]) -> Iterator[list[int]]:
    part: list[int] = []
    for token in tokens:
        if token < 256:
            part.append(token)
        elif part:
            yield part
            part = []


@settings(deadline=None, max_examples=30)
@given(added=st.lists(st.text(min_size=1, max_size=20), max_size=20), seed=st.integers(0, 99))
def test_a_document_stays_on_its_side(added: list[str], seed: int) -> None:
    now = [*TEXTS[:60], *added, TEXTS[3]]
    Random(seed).shuffle(now)
    before = {text for text in documents(split_of(ListSource(TEXTS[:60]), 0.3).held_out) if text}
    after = {text for text in documents(split_of(ListSource(now), 0.3).held_out) if text}
    assert after & set(TEXTS[:60]) == before


def test_training_keeps_its_order(source: Any) -> None:
    """What is held out is passed over; the order of the others is that of all documents."""

    def order(of: Any) -> list[str]:
        loader = flat_loader([MixtureSource(of, max_epochs=1)], ByteTokenizer(), seq_len=512, global_batch_size=1)
        tokens = [token for batch in loader for token in batch["tokens"].flatten().tolist()]
        return [bytes(part).decode() for part in _documents_in(tokens)]

    training, held_out = split_of(source, 0.2)
    away = set(documents(held_out))
    assert order(training) == [text for text in order(source) if text not in away]


def test_what_a_state_and_other_processes_know(source: Any) -> None:
    training, held_out = split_of(source, 0.2)
    digests = {of.fingerprint().digest for of in (source, training, held_out, split_of(source, 0.3).training)}
    assert len(digests) == 4
    assert training.fingerprint().items == source.fingerprint().items
    copy = pickle.loads(pickle.dumps(held_out)) if not isinstance(source, ListStream) else held_out
    assert documents(copy) == documents(held_out)
    if isinstance(source, TokenSource):
        assert (training.vocab_size, training.tokenizer_fingerprint) == (258, source.tokenizer_fingerprint)
        lengths = training.lengths(np.arange(len(training)))
        assert lengths.tolist() == [len(training[i]) for i in range(len(training))]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(DataError, match="larger than 0 and smaller than 1"):
        split_of(ListSource(TEXTS), share)
