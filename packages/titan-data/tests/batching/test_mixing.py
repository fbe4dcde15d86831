"""Shares in tokens, phases, ends of sources, and sources that join a run."""

import json
from collections import Counter
from fractions import Fraction
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_flat import flat_loader
from data_loader_cases import ListStream, ListTokens, digest, numbered, open_loader
from titan_data import DataError, ListSource, Loader, MixtureSource, Packing, Phase
from titan_data.batching.mixing import Turns, resolve_phases


def texts(name: str, count: int = 40) -> ListSource:
    return ListSource([f"{name} {i} " * (i % 5 + 1) for i in range(count)], name)


@settings(deadline=None, max_examples=100)
@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=7).filter(any), rows=st.integers(1, 300))
def test_shares_are_right_to_within_one_sequence_at_any_time(weights: list[int], rows: int) -> None:
    weights = [0, *weights]
    tokens = [10**6] + [0] * (len(weights) - 1)  # the first one has had its time
    turns = Turns(weights, tokens, 10)
    for row in range(1, rows + 1):
        source = turns.next()
        turns.took(source, 10)
        tokens[source] += 10
        assert tokens[0] == 10**6
        for weight, count in zip(weights[1:], tokens[1:], strict=True):
            assert abs(Fraction(weight, sum(weights)) * row * 10 - count) < 10


@settings(deadline=None, max_examples=100)
@given(
    weights=st.lists(st.floats(0, 9) | st.integers(0, 3).map(float), min_size=1, max_size=12),
    tokens=st.lists(st.integers(0, 300), min_size=12, max_size=12),
    lengths=st.lists(st.integers(1, 10), max_size=60),
)
def test_turns_are_those_of_the_definition(weights: list[float], tokens: list[int], lengths: list[int]) -> None:
    """Sequences with padding too, from any counts: the first of those not above their shares, in the order of turns."""
    tokens = tokens[: len(weights)]
    turns = Turns(weights, tokens, 10)
    for length in lengths:
        total = sum(weights)
        used = sum(count for count, weight in zip(tokens, weights, strict=True) if weight > 0) + 10
        keys = [
            (count * total >= weight * used, (count + 10) / weight, number)
            for number, (weight, count) in enumerate(zip(weights, tokens, strict=True))
            if weight > 0
        ]
        source = turns.next()
        assert source == (min(keys)[2] if keys else None)
        if source is None:
            break
        turns.took(source, length)
        tokens[source] += length


def test_no_source_where_no_weight_is_left() -> None:
    assert Turns([0.0, 0.0], [5, 7], 10).next() is None


@pytest.mark.parametrize("kind", ["concat", "best_fit", "one_per_row"])
def test_weights_are_in_tokens_not_in_documents_or_sequences(kind: str) -> None:
    # One source's documents are ten times as long, and the other's sequences are mostly padding in two packings.
    sources = [
        MixtureSource(ListTokens([[1] * 100] * 50, "long"), 3.0),
        MixtureSource(ListTokens([[2] * 10] * 50, "short"), 1.0),
    ]
    loader = flat_loader(sources, None, seq_len=100, global_batch_size=16, packing=Packing(kind))
    for _ in range(40):
        batch = next(loader)
    account = loader.accounting()
    assert abs(account["short"]["tokens"] * 3 - account["long"]["tokens"]) < 4 * 100
    assert account["long"]["documents"] == account["long"]["tokens"] // 100
    assert account["short"]["documents"] == account["short"]["tokens"] // 10
    for name, tokens in zip(batch["sources"], batch["tokens"], strict=True):
        assert {1: "long", 2: "short"}[int(tokens[0])] == name


def test_each_source_goes_its_own_way() -> None:
    # What a source gives does not depend on what it is mixed with.
    def rows_of(name: str, *others: str) -> list[Any]:
        loader = open_loader([MixtureSource(texts(name)), *(MixtureSource(texts(other), 0.5) for other in others)])
        rows = []
        while len(rows) < 12:
            batch = next(loader)
            rows += [
                row.tolist() for row, source in zip(batch["tokens"], batch["sources"], strict=True) if source == name
            ]
        return rows[:12]

    assert rows_of("a") == rows_of("a", "b") == rows_of("a", "c", "d")
    assert rows_of("a") != rows_of("b")


def test_phases_switch_weights_and_length_at_their_steps() -> None:
    phases = [Phase(3, {"b": 1.0}), Phase(5, seq_len=20), Phase(7, {"a": 1.0, "b": 3.0}, 8)]
    loader = open_loader([MixtureSource(texts("a")), MixtureSource(texts("b"), 0.0)], phases=phases)
    seen = []
    for _ in range(9):
        tokens_per_step = loader.tokens_per_step
        batch = next(loader)
        assert tokens_per_step == batch["tokens"].numel()
        seen.append((batch["tokens"].shape[1], dict(Counter(batch["sources"]))))
    assert seen == [(16, {"a": 8})] * 3 + [(16, {"b": 8})] * 2 + [(20, {"b": 8})] * 2 + [(8, {"a": 2, "b": 6})] * 2


def test_a_new_phase_does_not_make_up_for_the_old_one() -> None:
    loader = open_loader(
        [MixtureSource(texts("a"), 0.9), MixtureSource(texts("b"), 0.1)], phases=[Phase(10, {"a": 1, "b": 1})]
    )
    for _ in range(10):
        next(loader)
    for _ in range(3):
        assert Counter(next(loader)["sources"]) == {"a": 4, "b": 4}


def goes_on_as(unbroken: Loader, resumed: Loader, steps: tuple[int, int] = (10, 30)) -> bool:
    """Whether a second loader, resumed from the first one's state, gives what the first one gives."""
    for _ in range(steps[0]):
        next(unbroken)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    return [digest([next(resumed)]) for _ in range(steps[1])] == [digest([next(unbroken)]) for _ in range(steps[1])]


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    factor=st.sampled_from([1, 0.1, 1 / 3, 7.3, 1e-9]),
    given_as=st.randoms(use_true_random=False),
)
def test_neither_the_order_of_the_list_nor_the_scale_of_the_weights_matters(
    weights: list[int], factor: float, given_as: Random
) -> None:
    mixture = {"edcba"[i]: weight for i, weight in enumerate(weights)}
    shuffled = given_as.sample(sorted(mixture), len(mixture))
    one = open_loader([MixtureSource(texts(name), weight) for name, weight in mixture.items()], global_batch_size=7)
    two = open_loader([MixtureSource(texts(name), mixture[name] * factor) for name in shuffled], global_batch_size=7)
    assert goes_on_as(one, two)


def test_weights_are_the_same_numbers_however_they_are_scaled() -> None:
    # Sums of decimals are not exact: 0.7 + 0.3 + 0.5 and 7 + 3 + 5 give quotients that differ in the last bit.
    for left, right in (((7, 3, 5), (0.7, 0.3, 0.5)), ((1, 2, 3), (1 / 3, 2 / 3, 1.0))):
        one, two = (
            resolve_phases(
                [MixtureSource(texts(name), weight) for name, weight in zip("abc", weights, strict=True)], 8, []
            )
            for weights in (left, right)
        )
        assert one == two
    tiny = resolve_phases([MixtureSource(texts("a"), 1.0), MixtureSource(texts("b"), 1e-15)], 8, [])
    assert tiny[0].weights == (1.0, 1e-15)


@pytest.mark.parametrize(
    "phases",
    [
        [Phase(5)],
        [Phase(5, {"a": 2, "b": 2, "c": 2})],
        [Phase(5, seq_len=16)],
        [Phase(3, {"a": 0.1, "b": 0.1, "c": 0.1}, 16), Phase(7)],
    ],
)
def test_a_phase_that_changes_nothing_is_dropped(phases: list[Phase]) -> None:
    def loader_with(phases: list[Phase]) -> Loader:
        return open_loader([MixtureSource(texts(name)) for name in "abc"], phases=phases)

    assert goes_on_as(loader_with([]), loader_with(phases))
    assert goes_on_as(loader_with(phases), loader_with([]))
    with pytest.raises(DataError, match="phases must be in the order of their steps"):
        loader_with([*phases, Phase(phases[-1].from_step)])


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase(5), Phase(5)], "from_step 5 follows 5"),
        ([Phase(0)], "after step 0, but from_step 0 follows 0"),
        ([Phase(5, {"c": 1.0})], "the phase from step 5 names 'c'; the sources are 'a', 'b'"),
        ([Phase(5, {"a": 0.0})], "all weights are zero from step 5 on"),
        ([Phase(5, {"a": -1.0})], "source 'a': a weight must be a finite number of at least 0, not -1.0"),
        ([Phase(5, seq_len=0)], "seq_len must be at least 1, not 0"),
    ],
)
def test_phases_that_cannot_be(phases: list[Phase], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_loader([MixtureSource(texts("a")), MixtureSource(texts("b"))], phases=phases)


def test_sources_that_cannot_be() -> None:
    with pytest.raises(DataError, match="at least one source"):
        open_loader([])
    with pytest.raises(DataError, match="several sources are called 'a'"):
        open_loader([MixtureSource(texts("a")), MixtureSource(texts("a"))])
    with pytest.raises(DataError, match="all weights are zero from step 0 on"):
        open_loader([MixtureSource(texts("a"), 0.0)])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="a weight must be a finite number of at least 0"):
            MixtureSource(texts("a"), weight)
    with pytest.raises(DataError, match="max_epochs must be at least 1"):
        MixtureSource(texts("a"), max_epochs=0)
    with pytest.raises(DataError, match="at_end must be 'drop' or 'error', not 'stop'"):
        MixtureSource(texts("a"), at_end="stop")
    with pytest.raises(DataError, match=r"a list is not a source.*use ListSource"):
        MixtureSource(["a", "b"])


def test_a_source_at_its_cap_leaves_and_the_others_share_in_proportion(caplog: pytest.LogCaptureFixture) -> None:
    sources = [
        MixtureSource(ListTokens([[1] * 8] * 50, "a"), 0.6),
        MixtureSource(ListTokens([[2] * 8] * 50, "b"), 0.2),
        MixtureSource(ListTokens([[3] * 8] * 4, "c"), 0.2, max_epochs=2),
    ]
    loader = flat_loader(sources, None, seq_len=8, global_batch_size=10, prefetch=0)
    counts = [Counter(next(loader)["sources"]) for _ in range(12)]
    assert counts[:4] == [{"a": 6, "b": 2, "c": 2}] * 4
    total = sum(counts[4:], Counter())
    assert abs(total["a"] - 60) <= 1
    assert abs(total["b"] - 20) <= 1
    assert total["c"] == 0
    assert loader.accounting()["c"]["tokens"] == 64
    assert "source 'c' has been used for 2 epochs, its max_epochs, and leaves the mixture" in caplog.text


def test_a_source_at_its_cap_is_an_error_where_that_is_asked_for() -> None:
    sources = [
        MixtureSource(texts("a")),
        MixtureSource(ListTokens([[3] * 16] * 10, "c"), 1.0, max_epochs=2, at_end="error"),
    ]
    loader = open_loader(sources)
    for _ in range(5):
        next(loader)
    state = loader.state_dict()
    for _ in range(2):
        with pytest.raises(DataError, match="source 'c' has been used for 2 epochs, its max_epochs: raise"):
            next(loader)
        assert loader.state_dict() == state
    assert loader.accounting()["c"]["tokens"] == 320


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_finite_loader_ends_and_stays_at_its_end(prefetch: int) -> None:
    loader = open_loader([MixtureSource(ListSource(["abc"] * 7), max_epochs=1)], seq_len=5, prefetch=prefetch)
    assert len(list(loader)) == 1
    assert list(loader) == []
    assert loader.step == 1
    again = open_loader([MixtureSource(ListSource(["abc"] * 7), max_epochs=1)], seq_len=5, prefetch=prefetch)
    again.load_state_dict(loader.state_dict())
    assert list(again) == []


def test_a_source_without_tokens_is_an_error_though_it_ends() -> None:
    with pytest.raises(DataError, match="source 'list' has no tokens"):
        next(open_loader([MixtureSource(ListSource(["", ""]), max_epochs=1)]))


def test_a_source_joins_and_the_others_go_on_where_they_were() -> None:
    old = [MixtureSource(texts("a"), 0.7), MixtureSource(ListStream([["x y z"] * 9, ["u v"] * 7], "b"), 0.3)]
    new = [*old, MixtureSource(texts("c"), 1.0)]
    loader = open_loader(old)
    for _ in range(5):
        next(loader)
    saved = json.loads(json.dumps(loader.state_dict()))
    joined = open_loader(new)
    with pytest.raises(DataError) as caught:
        joined.load_state_dict(saved)
    assert "weights: saved {'a': 0.7, 'b': 0.3}, now {'a': 0.35, 'b': 0.15, 'c': 0.5}" in str(caught.value)
    assert "allow_changes={'mixture'}" in str(caught.value)
    joined.load_state_dict(saved, allow_changes={"mixture"})
    before, after = (
        {name: source for name, source in state["sources"].items() if name != "c"}
        for state in (saved, joined.state_dict())
    )
    assert {n: (s["cursor"], s["offset"], s["tally"]) for n, s in after.items()} == {
        n: (s["cursor"], s["offset"], s["tally"]) for n, s in before.items()
    }
    assert Counter(next(joined)["sources"])["c"] == 4  # its share at once, from the first sequence

    # From there on a and b give what they would have given without c.
    alone = {"a": [], "b": []}
    mixed = {"a": [], "b": [], "c": []}
    joined.load_state_dict(saved, allow_changes={"mixture"})
    for _ in range(6):
        for rows, batch in ((alone, next(loader)), (mixed, next(joined))):
            for name, row in zip(batch["sources"], batch["tokens"].tolist(), strict=True):
                rows[name].append(row)
    for name in alone:
        common = min(len(alone[name]), len(mixed[name]))
        assert common >= 3
        assert alone[name][:common] == mixed[name][:common]


def test_what_lies_in_the_future_may_change_freely() -> None:
    loader = open_loader([MixtureSource(texts("a"))], phases=[Phase(9, seq_len=4)])
    for _ in range(4):
        next(loader)
    saved = loader.state_dict()
    sources = [MixtureSource(texts("a"), 2.0), MixtureSource(texts("b"), 0.0)]
    changed = open_loader(sources, phases=[Phase(4, {"a": 1, "b": 1})])
    changed.load_state_dict(saved)
    assert Counter(next(changed)["sources"]) == {"a": 4, "b": 4}
    with pytest.raises(DataError, match=r"weights from step 3: saved None, now \{'a': 0\.5, 'b': 0\.5\}"):
        open_loader(sources, phases=[Phase(3, {"a": 1, "b": 1})]).load_state_dict(saved)


def test_max_epochs_may_change_as_long_as_it_made_no_difference() -> None:
    def loader_with(max_epochs: int | None) -> Loader:
        return open_loader(
            [MixtureSource(ListSource(["abc"] * 20), max_epochs=max_epochs)], seq_len=25, global_batch_size=1
        )

    loader = loader_with(3)
    for _ in range(5):
        next(loader)
    in_second_epoch = loader.state_dict()
    loader_with(2).load_state_dict(in_second_epoch)
    with pytest.raises(DataError, match="max_epochs of 'list': saved 3, now 1"):
        loader_with(1).load_state_dict(in_second_epoch)
    assert len(list(loader)) == 7  # in all 12 sequences of 25 tokens, which are 3 epochs of 20 * 5
    at_the_end = loader.state_dict()
    with pytest.raises(DataError, match="max_epochs of 'list': saved 3, now 2"):
        loader_with(2).load_state_dict(at_the_end)
    longer = loader_with(4)
    longer.load_state_dict(at_the_end)
    assert len(list(longer)) == 4


def test_a_source_that_has_left_comes_back_if_it_may() -> None:
    def loader_with(max_epochs: int | None) -> Loader:
        few = ListTokens([[3] * 16] * 4, "few")
        return open_loader([MixtureSource(texts("a")), MixtureSource(few, max_epochs=max_epochs)])

    loader = loader_with(1)
    for _ in range(3):
        next(loader)
    assert loader.state_dict()["sources"]["few"]["ended"]
    back = loader_with(3)
    with pytest.raises(DataError, match="max_epochs of 'few': saved 1, now 3"):
        back.load_state_dict(loader.state_dict())
    back.load_state_dict(loader.state_dict(), allow_changes={"mixture"})
    assert Counter(next(back)["sources"]) == {"a": 4, "few": 4}


def test_numbered_documents_of_two_sources_are_all_used() -> None:
    one, two = numbered([5, 9, 0, 14]), numbered([3, 3])
    sources = [MixtureSource(ListTokens(one, "one"), 0.5, 1), MixtureSource(ListTokens(two, "two"), 0.5, 1)]
    got = {"one": [], "two": [], "": []}
    for batch in flat_loader(sources, None, seq_len=4, global_batch_size=3):
        for name, row in zip(batch["sources"], batch["tokens"].tolist(), strict=True):
            got[name] += [token for token in row if token]
    assert {name: sorted(tokens) for name, tokens in got.items()} == {
        "one": list(range(1, 29)),
        "two": list(range(1, 7)),
        "": [],
    }


def test_digest_sees_the_sources() -> None:
    assert digest([next(open_loader(texts("a", 1)))]) != digest([next(open_loader(texts("b", 1)))])
