"""The promise: global batch n is the same on any number of ranks, however often the run is stopped and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_flat import flat_files, flat_loader
from data_loader_cases import GLOBAL_BATCH_SIZE, WORLD_SIZES, make_source, run_in_parts
from titan_data import ByteTokenizer, ListSource, Loader, MixtureSource, Packing, Phase
from titan_data.shards.dataset import TokenShards
from titan_data.shards.prepare import prepare

KINDS = ("texts", "tokens", "stream")

parts = st.lists(
    st.tuples(
        st.sampled_from(WORLD_SIZES),
        st.sampled_from((0, 0, 2)),  # workers
        st.sampled_from((0, 0, 2)),  # prefetch
        st.integers(1, GLOBAL_BATCH_SIZE),  # microbatch
        st.integers(0, 4),  # steps
    ),
    min_size=1,
    max_size=4,
)
packings = st.builds(
    Packing,
    kind=st.sampled_from(("best_fit", "one_per_row")),
    long_documents=st.sampled_from(("split", "crop")),
    packing_window=st.integers(1, 12),
    cross_document=st.booleans(),
) | st.builds(Packing, cross_document=st.booleans())


def whole(parts: list[Any]) -> list[tuple[int, int, int, int, int]]:
    """The same number of steps on a single rank, unbroken."""
    return [(1, 0, 0, GLOBAL_BATCH_SIZE, sum(steps for *_, steps in parts))]


one_source = {
    "texts": st.lists(st.text(max_size=60), min_size=3, max_size=40).filter(any),
    "kind": st.sampled_from(KINDS),
    "shuffle": st.booleans(),
    "seed": st.integers(-3, 2**70),
    "seq_len": st.integers(1, 24),
    "packing": packings,
    "max_epochs": st.sampled_from((None, None, 1, 3)),
    "parts": parts,
}
mixture = {
    "corpora": st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.lists(st.text(max_size=40), min_size=3, max_size=20).filter(any),
            st.sampled_from((0.0, 0.1, 1.0, 2.5)),
            st.sampled_from((None, 1, 2)),
        ),
        min_size=2,
        max_size=4,
    ),
    "stages": st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9), st.integers(1, 20)), max_size=3),
    "packing": packings,
    "parts": parts,
}


def check_one_source(
    texts: list[str],
    kind: str,
    shuffle: bool,
    seed: int,
    seq_len: int,
    packing: Packing,
    max_epochs: int | None,
    parts: list[Any],
) -> None:
    def make_loader(**place: Any) -> Loader:
        return flat_loader(
            [MixtureSource(make_source(kind, texts), max_epochs=max_epochs)],
            ByteTokenizer(),
            seq_len=seq_len,
            global_batch_size=GLOBAL_BATCH_SIZE,
            seed=seed,
            shuffle=shuffle,
            packing=packing,
            **place,
        )

    assert run_in_parts(make_loader, parts) == run_in_parts(make_loader, whole(parts))


def check_mixture(corpora: list[Any], stages: list[Any], packing: Packing, parts: list[Any]) -> None:
    names = [f"source {i}" for i in range(len(corpora))]

    def make_loader(**place: Any) -> Loader:
        weighted = []
        for (kind, texts, weight, max_epochs), name in zip(corpora, names, strict=True):
            source = make_source(kind, texts)
            source.name = name
            weighted.append(MixtureSource(source, weight + 0.01, max_epochs))
        switches = [
            Phase(step, {names[favourite % len(names)]: 3.0, names[0]: 1.0}, seq_len)
            for step, favourite, seq_len in sorted({stage[0]: stage for stage in stages}.values())
        ]
        return flat_loader(
            weighted,
            ByteTokenizer(),
            seq_len=12,
            global_batch_size=GLOBAL_BATCH_SIZE,
            packing=packing,
            phases=switches,
            **place,
        )

    assert run_in_parts(make_loader, parts) == run_in_parts(make_loader, whole(parts))


@settings(deadline=None, max_examples=20)
@given(**one_source)
def test_one_source(**case: Any) -> None:
    check_one_source(**case)


@settings(deadline=None, max_examples=12)
@given(**mixture)
def test_mixtures_with_phases(**case: Any) -> None:
    check_mixture(**case)


@pytest.mark.nightly
@settings(deadline=None, max_examples=40)
@given(**one_source)
def test_one_source_at_length(**case: Any) -> None:
    check_one_source(**case)


@pytest.mark.nightly
@settings(deadline=None, max_examples=30)
@given(**mixture)
def test_mixtures_with_phases_at_length(**case: Any) -> None:
    check_mixture(**case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", ["concat", "best_fit", "one_per_row"])
def test_all_worlds_in_turn_across_epochs(kind: str, packing: str) -> None:
    texts = [f"document {i} " * (i % 7 + 1) for i in range(50)]

    def make_loader(**place: Any) -> Loader:
        source = make_source(kind, texts)
        return flat_loader(
            source,
            ByteTokenizer(),
            seq_len=32,
            global_batch_size=GLOBAL_BATCH_SIZE,
            seed=3,
            packing=Packing(packing),
            **place,
        )

    digests, end = run_in_parts(make_loader, [(1, 0, 0, GLOBAL_BATCH_SIZE, 24)])
    in_parts, same_end = run_in_parts(
        make_loader, [(w, w % 3, 1, w, 1) for w in (*WORLD_SIZES, *reversed(WORLD_SIZES)) * 2]
    )
    assert in_parts == digests
    assert same_end == end
    assert json.loads(end)["sources"]["source"]["cursor"][0] >= 3, "the test should cross epochs"
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", ["concat", "best_fit", "one_per_row"])
def test_empty_documents_at_the_ends_of_epochs_are_counted_once_though_a_run_stops_at_every_step(
    kind: str, packing: str
) -> None:
    texts = ["", "", "", "a", "bc", "", "def", "gh", "i", "", "", "", ""]

    def make_loader(**place: Any) -> Loader:
        source = make_source(kind, texts)
        packed = Packing(packing, packing_window=4)
        return flat_loader(
            source, ByteTokenizer(), seq_len=5, global_batch_size=1, shuffle=False, packing=packed, **place
        )

    assert run_in_parts(make_loader, [(1, 0, 0, 1, 1)] * 20) == run_in_parts(make_loader, [(1, 0, 0, 1, 20)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", ["concat", "best_fit", "one_per_row"])
def test_empty_documents_after_the_last_one_are_counted_though_the_run_goes_on_without_their_source(
    kind: str, packing: str
) -> None:
    # The source leaves when a sequence is wanted after its last one, which may be after a resume.
    def make_loader(**place: Any) -> Loader:
        few = make_source(kind, ["", "abc", "", "", ""])
        sources = [MixtureSource(few, max_epochs=2), MixtureSource(ListSource(["others"] * 9, "others"))]
        packed = Packing(packing, packing_window=17)
        return flat_loader(
            sources, ByteTokenizer(), seq_len=5, global_batch_size=1, shuffle=False, packing=packed, **place
        )

    digests, end = run_in_parts(make_loader, [(1, 0, 0, 1, 12)])
    assert json.loads(end)["sources"]["source"]["ended"]
    assert json.loads(end)["sources"]["source"]["tally"]["skipped"] == 8
    assert run_in_parts(make_loader, [(1, 0, 0, 1, 1)] * 12) == (digests, end)


def test_files_and_token_shards(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    prepare(ListSource([f"prepared {i} " * (i % 9) for i in range(120)]), tokenizer, tmp_path / "shards", workers=0)
    for number in range(5):
        lines = (json.dumps({"text": f"file {number} line {i} " * (i % 4)}) for i in range(number * 13))
        (tmp_path / f"part-{number}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def make_loader(**place: Any) -> Loader:
        files = str(tmp_path / "*.jsonl")
        sources = [
            MixtureSource(TokenShards(tmp_path / "shards"), 0.5),
            MixtureSource(flat_files(files, name="rows"), 0.3, max_epochs=2),
            MixtureSource(flat_files(files, streaming=True, shards=3, name="stream"), 0.2),
        ]
        return flat_loader(
            sources,
            tokenizer,
            seq_len=40,
            global_batch_size=GLOBAL_BATCH_SIZE,
            phases=[Phase(7, {"stream": 1, "shards": 1})],
            **place,
        )

    digests, end = run_in_parts(make_loader, [(1, 0, 0, GLOBAL_BATCH_SIZE, 12)])
    in_parts, same_end = run_in_parts(make_loader, [(w, w % 3, w % 2, w, 2) for w in WORLD_SIZES])
    assert in_parts == digests
    assert same_end == end
    assert len(set(digests)) == 12
