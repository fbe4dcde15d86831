"""Fingerprints: equal only for equal sources, small, and able to say what has changed."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_flat import flat_loader
from titan_data import ByteTokenizer, Fingerprint, ListSource, MixtureSource
from titan_data.fingerprint import MAX_ITEMS, list_differences

FILES = [("a.jsonl", "1"), ("b.jsonl", "2"), ("c.jsonl", "3")]
items = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=5)


@example(one=("x", [("ab", "c")]), two=("x", [("a", "bc")]))
@example(one=("x", [("a", "b"), ("c", "d")]), two=("x", [("c", "d"), ("a", "b")]))
@given(one=st.tuples(st.sampled_from("xy"), items), two=st.tuples(st.sampled_from("xy"), items))
def test_equal_exactly_if_everything_is(one: Any, two: Any) -> None:
    assert (Fingerprint.of(*one).digest == Fingerprint.of(*two).digest) == (one == two)
    assert (list_differences(Fingerprint.of(*one), Fingerprint.of(*two)) == []) == (one == two)


@given(items=items, settings=st.dictionaries(st.text(max_size=2), st.none() | st.integers() | st.text(max_size=2)))
def test_through_json_and_back(items: list[tuple[str, str]], settings: dict[str, Any]) -> None:
    fingerprint = Fingerprint.of("kind", items, settings)
    assert Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json(), sort_keys=True))) == fingerprint


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        (FILES, []),
        ([("a.jsonl", "1"), ("b.jsonl", "X"), ("c.jsonl", "3")], ["edited: b.jsonl"]),
        ([*FILES, ("d.jsonl", "4")], ["added: d.jsonl"]),
        (FILES[1:], ["removed: a.jsonl"]),
        ([FILES[1], FILES[0], FILES[2]], ["reordered: b.jsonl, a.jsonl"]),
        ([FILES[1], ("c.jsonl", "X"), ("d.jsonl", "4")], ["edited: c.jsonl", "added: d.jsonl", "removed: a.jsonl"]),
    ],
)
def test_differences_are_listed_by_what_happened(changed: list[tuple[str, str]], lines: list[str]) -> None:
    assert list_differences(Fingerprint.of("jsonl", FILES), Fingerprint.of("jsonl", changed)) == lines


def test_other_settings_and_kinds() -> None:
    then = Fingerprint.of("jsonl", FILES, {"text_key": "text", "same": 1})
    now = Fingerprint.of("jsonl", FILES, {"text_key": "body", "same": 1, "new": True})
    assert list_differences(then, now) == ["new: was None, now True", "text_key: was 'text', now 'body'"]
    assert list_differences(then, Fingerprint.of("parquet", FILES)) == ["kind: was jsonl, now parquet"]


def test_many_items_are_not_kept() -> None:
    then = Fingerprint.of("jsonl", ((f"{i}", "") for i in range(MAX_ITEMS + 1)))
    assert (then.items, then.count) == ((), MAX_ITEMS + 1)
    assert len(Fingerprint.of("jsonl", ((f"{i}", "") for i in range(MAX_ITEMS))).items) == MAX_ITEMS
    more = Fingerprint.of("jsonl", ((f"{i}", "") for i in range(MAX_ITEMS + 3)))
    assert list_differences(then, more) == [f"number of items: was {MAX_ITEMS + 1}, now {MAX_ITEMS + 3}"]
    edited = Fingerprint.of("jsonl", ((f"{i}", "x") for i in range(MAX_ITEMS + 1)))
    assert list_differences(then, edited) == [
        f"at least one of its {MAX_ITEMS + 1} items has changed (too many to list)"
    ]


def test_long_lists_are_cut_short() -> None:
    then = Fingerprint.of("jsonl", [(f"{i}", "") for i in range(30)])
    now = Fingerprint.of("jsonl", [(f"{i}", "x") for i in range(30)])
    assert list_differences(then, now) == ["edited: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more"]


def test_the_state_of_many_sources_is_small() -> None:
    class Files(ListSource):
        def __init__(self, name: str, count: int) -> None:
            super().__init__([f"text of {name}"], name)
            self.count = count

        def fingerprint(self) -> Fingerprint:
            return Fingerprint.of(
                "files", ((f"{self.name}/part-{i:05d}.jsonl", "0123456789abcdef") for i in range(self.count))
            )

    def state(*counts: int) -> Any:
        sources = [MixtureSource(Files(f"source-{i:03d}", count)) for i, count in enumerate(counts)]
        loader = flat_loader(sources, ByteTokenizer(), seq_len=8, global_batch_size=1, prefetch=0)
        next(loader)
        return loader.state_dict()

    many = state(*[MAX_ITEMS] * 100)
    assert len(json.dumps(many)) < 100 * 1024
    few = state(MAX_ITEMS, 5, MAX_ITEMS - 5)["sources"]
    assert [len(source["fingerprint"]["items"]) for source in few.values()] == [0, 5, MAX_ITEMS - 5]
    assert few["source-000"]["fingerprint"]["digest"] == Files("source-000", MAX_ITEMS).fingerprint().digest
