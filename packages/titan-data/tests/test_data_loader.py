"""The promise: global batch n is the same on any number of ranks, however often the run is stopped and resumed."""

import hashlib
import json
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_data import ByteTokenizer, DataError, ListSource, Loader, StdlibSource

WORLDS = (1, 2, 3, 4, 6, 8)
ROWS = 24  # divides among all of them
KEYS = ("tokens", "labels", "positions", "document_ids")


class ListStream:
    """A list of strings that can only be read in order."""

    name = "stream"

    def __init__(self, texts):
        self._texts = texts
        self.fingerprint = ListSource(texts).fingerprint

    def iterate(self, start):
        yield from self._texts[start:]


class Flaky(ListSource):
    """A source whose reads fail while `broken` is set: at the second read, or all."""

    broken = False

    def __getitem__(self, index):
        if self.broken:
            self.reads += 1
            if self.reads > 1:
                raise OSError("the disk is away")
        return super().__getitem__(index)


class FlakyStream(ListStream):
    """The same for a stream."""

    broken = False

    def iterate(self, start):
        for number, text in enumerate(self._texts[start:]):
            if self.broken and number > 0:
                raise OSError("the network is away")
            yield text


def open_loader(source, **changes):
    return Loader(source, ByteTokenizer(), **{"seq_len": 16, "global_batch_size": 8, **changes})


def digest(batches):
    """SHA-256 of a global batch, given the ranks' rows in order."""
    sha = hashlib.sha256()
    for key in KEYS:
        sha.update(array("q", torch.cat([batch[key] for batch in batches]).flatten().tolist()).tobytes())
    return sha.hexdigest()


def run_in_parts(make_source, parts, settings):
    """Run `parts` of (world, steps), each resumed from the JSON state of the one before; give each step's digest."""
    saved, digests = None, []
    for world, steps in parts:
        ranks = [Loader(make_source(), ByteTokenizer(), **settings, rank=r, world=world) for r in range(world)]
        if saved is not None:
            for loader in ranks:
                loader.load_state_dict(json.loads(saved))
        for _ in range(steps):
            digests.append(digest([next(loader) for loader in ranks]))
        states = {json.dumps(loader.state_dict()) for loader in ranks}
        assert len(states) == 1, "ranks disagree about where they are"
        saved = states.pop()
    return digests, saved


@settings(deadline=None, max_examples=150)
@given(
    corpus=st.lists(st.text(max_size=60), min_size=1, max_size=40).filter(any),
    stream=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
    seq_len=st.integers(1, 24),
    parts=st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 4)), min_size=1, max_size=4),
)
def test_any_ranks_and_any_stops_give_the_unbroken_run(corpus, stream, shuffle, seed, seq_len, parts):
    settings = {"seq_len": seq_len, "global_batch_size": ROWS, "seed": seed, "shuffle": shuffle}

    def make_source():
        return ListStream(corpus) if stream else ListSource(corpus)

    whole, end = run_in_parts(make_source, [(1, sum(steps for _, steps in parts))], settings)
    in_parts, end_in_parts = run_in_parts(make_source, parts, settings)
    assert in_parts == whole
    assert end_in_parts == end


@pytest.mark.parametrize("kind", [ListSource, ListStream])
def test_all_worlds_in_turn_across_epochs(kind):
    corpus = [f"document {i} " * (i % 7 + 1) for i in range(50)]
    settings = {"seq_len": 32, "global_batch_size": ROWS, "seed": 3}
    whole, end = run_in_parts(lambda: kind(corpus), [(1, 24)], settings)
    in_parts, _ = run_in_parts(lambda: kind(corpus), [(w, 1) for w in (*WORLDS, *reversed(WORLDS))] * 2, settings)
    assert in_parts == whole
    assert json.loads(end)["queue"][0] >= 4, "the test should cross epochs"
    assert len(set(whole)) == len(whole)


def test_digest_of_the_data_order_is_fixed_for_all_time():
    # Saved runs go on in this very order with every later version.
    corpus = [f"document {i} " * (i % 5 + 1) for i in range(30)]
    digests, _ = run_in_parts(lambda: ListSource(corpus), [(2, 6)], {"seq_len": 64, "global_batch_size": 4, "seed": 7})
    assert hashlib.sha256("".join(digests).encode()).hexdigest()[:16] == "b60cc77d97c242e5"


def test_seed_and_shuffle_matter():
    corpus = [f"text number {i}" for i in range(50)]
    firsts = {digest([next(open_loader(ListSource(corpus), seed=seed))]) for seed in range(4)}
    firsts.add(digest([next(open_loader(ListSource(corpus), shuffle=False))]))
    assert len(firsts) == 5


def test_a_loader_can_go_back_to_its_own_state():
    loader = open_loader(StdlibSource(), seq_len=200)
    next(loader)
    state = loader.state_dict()
    there = [digest([next(loader)]) for _ in range(5)]
    loader.load_state_dict(state)
    assert loader.step == 1
    assert [digest([next(loader)]) for _ in range(5)] == there


def test_attributes_and_iteration():
    loader = open_loader(ListSource(["a" * 100]), seq_len=25, global_batch_size=2)
    assert (loader.tokens_per_step, loader.step, loader.epoch) == (50, 0, 0)
    for batch in loader:
        assert batch["tokens"].shape == (2, 25)
        if loader.step == 3:
            break
    assert loader.epoch == 2  # a document of 102 tokens is one epoch: each of the two lanes holds one


def test_resume_reads_only_what_lanes_hold():
    class Counting(ListSource):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    corpus = ["x" * 10] * 1000
    loader = open_loader(Counting(corpus), global_batch_size=4, seq_len=100)
    for _ in range(20):
        next(loader)
    state = loader.state_dict()
    assert Counting.reads > 600
    Counting.reads = 0
    open_loader(Counting(corpus), global_batch_size=4, seq_len=100).load_state_dict(state)
    assert Counting.reads == sum(lane is not None for lane in state["lanes"]) <= 4


@pytest.mark.parametrize("kind", [Flaky, FlakyStream])
def test_a_failed_read_leaves_the_step_before(kind):
    corpus = [f"document {i}" for i in range(40)]
    expected = open_loader(kind(corpus))
    digests = [digest([next(expected)]) for _ in range(6)]
    source = kind(corpus)
    loader = open_loader(source)
    got = [digest([next(loader)]) for _ in range(3)]
    state = loader.state_dict()
    loader.load_state_dict(state)
    source.broken, source.reads = True, 0
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            next(loader)
        assert loader.state_dict() == state
    source.broken = False
    assert got + [digest([next(loader)]) for _ in range(3)] == digests


def test_changed_settings_are_refused_and_all_of_them_listed():
    state = open_loader(ListSource(["abc"]), seed=1).state_dict()

    class Other(ByteTokenizer):
        fingerprint = "other"

    loader = Loader(ListSource(["abcd"]), Other(), seq_len=17, global_batch_size=4, seed=2, shuffle=False)
    with pytest.raises(DataError) as caught:
        loader.load_state_dict(state)
    message = str(caught.value)
    for line in (
        "seq_len: saved 16, now 17",
        "global_batch_size: saved 8, now 4",
        "seed: saved 1, now 2",
        "shuffle: saved True, now False",
        "tokenizer: saved 'titan-data/bytes/1', now 'other'",
        f"source: saved '{ListSource(['abc']).fingerprint}', now '{ListSource(['abcd']).fingerprint}'",
        "Resume with the saved values, or start a new run in a new folder.",
    ):
        assert line in message
    assert message.count(": saved") == 6


@pytest.mark.parametrize("setting", ["seed", "seq_len", "global_batch_size", "shuffle"])
def test_one_changed_setting_is_named_alone(setting):
    state = open_loader(ListSource(["abc"])).state_dict()
    changes = {"seed": 5, "seq_len": 8, "global_batch_size": 16, "shuffle": False}
    with pytest.raises(DataError) as caught:
        open_loader(ListSource(["abc"]), **{setting: changes[setting]}).load_state_dict(state)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]] == [setting]


def test_damaged_states_are_refused_and_leave_the_loader_alone():
    loader = open_loader(ListSource(["abc" * 30, "de" * 20]))
    next(loader)
    good = loader.state_dict()
    lane = good["lanes"][0]
    for change in (
        {"version": 2},
        {"settings": None},
        {"step": -1},
        {"step": True},
        {"queue": [0]},
        {"queue": [0, 2]},  # no such document
        {"lanes": good["lanes"][1:]},
        {"lanes": [[0, 1], *good["lanes"][1:]]},
        {"lanes": [[lane[0], lane[1], 10_000], *good["lanes"][1:]]},
        {"lanes": [[0, 99, 0], *good["lanes"][1:]]},
    ):
        with pytest.raises(DataError, match=r"damaged|version|have changed|there is no"):
            loader.load_state_dict({**good, **change})
        assert loader.state_dict() == good
    with pytest.raises(DataError, match="version None"):
        loader.load_state_dict({})


def test_a_stream_that_has_become_shorter_is_noticed():
    class Shrinking(ListStream):
        fingerprint = "always the same"

        def __init__(self, texts):
            self._texts = texts

    loader = open_loader(Shrinking(["a" * 50] * 20))
    next(loader)
    with pytest.raises(DataError, match="its documents have changed"):
        open_loader(Shrinking(["a" * 50])).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("kind", [ListSource, ListStream])
def test_a_corpus_without_tokens_ends_in_an_error(kind):
    with pytest.raises(DataError, match="has no documents"):
        next(open_loader(kind([])))
    with pytest.raises(DataError, match="not one token in a whole epoch"):
        next(open_loader(kind(["", "", ""])))


@pytest.mark.parametrize("kind", [ListSource, ListStream])
def test_empty_documents_are_passed_over(kind):
    sparse = open_loader(kind(["", "a", "", "", "b", ""]), shuffle=False)
    dense = open_loader(kind(["a", "b"]), shuffle=False)
    assert [digest([next(sparse)]) for _ in range(3)] == [digest([next(dense)]) for _ in range(3)]


def test_lone_surrogates_do_not_stop_a_run():
    batch = next(open_loader(ListSource(["a\ud800b"]), seq_len=5, global_batch_size=1))
    assert batch["tokens"].tolist() == [[256, 97, 63, 98, 257]]


def test_sizes_that_do_not_fit_name_numbers_that_do():
    source = ListSource(["a"])
    with pytest.raises(DataError, match=r"global_batch_size = 10 .* world = 4 ranks; use global_batch_size = 8 or 12"):
        open_loader(source, global_batch_size=10, world=4)
    with pytest.raises(DataError, match=r"use global_batch_size = 4$"):
        open_loader(source, global_batch_size=3, world=4)
    for name in ("seq_len", "global_batch_size", "world"):
        with pytest.raises(DataError, match=f"{name} must be at least 1, not 0"):
            open_loader(source, **{name: 0})
    for rank in (-1, 2):
        with pytest.raises(DataError, match=rf"rank must be in 0\.\.1 for world = 2, not {rank}"):
            open_loader(source, rank=rank, world=2)


def test_a_plain_list_is_no_source():
    with pytest.raises(DataError, match="use ListSource"):
        open_loader(["a", "b"])
