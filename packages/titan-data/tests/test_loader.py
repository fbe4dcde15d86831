"""Reading ahead, states and their refusal, failures in the middle of a step, and how little a resume reads."""

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_broken import PanickingTokenizer
from data_flat import flat_files, flat_loader
from data_loader_cases import ListStream, ListTokens, digest, encoded, make_source, open_loader
from titan_data import (
    ByteTokenizer,
    ChangedDataError,
    DataError,
    Fingerprint,
    IterableSource,
    ListSource,
    Loader,
    MixtureSource,
    Packing,
    Permutation,
    Phase,
)
from titan_data.batching.global_batches import ReaderState, SourceState
from titan_data.batching.packing import PackerState
from titan_data.batching.state import dump_state

KINDS = ("texts", "tokens", "stream")
TEXTS = [f"document {i} " * (i % 5 + 1) for i in range(40)]


class Flaky:
    """Makes any source's reads fail while `broken`, but for the first `spare` of them, or fail `once`."""

    broken, spare, once = False, 0, False

    def __init__(self, source: Any) -> None:
        self._source = source
        # Python 3.12: checks against a protocol look attributes up without __getattr__.
        for name in dir(source):
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, getattr(source, name))

    def fail(self) -> None:
        if self.broken:
            self.spare -= 1
            if self.spare < 0:
                self.broken = not self.once
                raise OSError("the disk is away")


class FlakyRows(Flaky):
    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        self.fail()
        return self._source[index]


class FlakyStream(Flaky):
    def iterate(self, shard: int, start: int) -> Iterator[str]:
        for text in self._source.iterate(shard, start):
            self.fail()
            yield text


def flaky(kind: str) -> Any:
    source = make_source(kind, TEXTS)
    return FlakyStream(source) if kind == "stream" else FlakyRows(source)


def test_attributes_and_iteration() -> None:
    loader = open_loader(ListSource(["a" * 100]), seq_len=25, global_batch_size=2)
    assert (loader.tokens_per_step, loader.step) == (50, 0)
    for batch in loader:
        assert batch["tokens"].shape == (2, 25)
        if loader.step == 3:
            break
    # Three steps of 50 tokens are the document of 102 once and 48 tokens of it again.
    assert loader.accounting() == {
        "list": {"tokens": 150, "documents": 1, "padding": 0, "cropped": 0, "skipped": 0, "epoch": 1}
    }


def test_seed_and_shuffle_matter() -> None:
    firsts = {digest([next(open_loader(ListSource(TEXTS), seed=seed))]) for seed in range(4)}
    firsts.add(digest([next(open_loader(ListSource(TEXTS), shuffle=False))]))
    assert len(firsts) == 5


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_loader_can_go_back_to_its_own_state(prefetch: int) -> None:
    loader = open_loader(ListSource(TEXTS), prefetch=prefetch)
    next(loader)
    state = loader.state_dict()
    there = [digest([next(loader)]) for _ in range(5)]
    loader.load_state_dict(state)
    assert loader.step == 1
    assert [digest([next(loader)]) for _ in range(5)] == there


# ---- reading ahead ----


def test_reading_ahead_is_bounded_and_the_state_is_of_what_was_handed_out() -> None:
    source = ListTokens([[i] * 8 for i in range(1000)])
    loader = flat_loader(source, None, seq_len=8, global_batch_size=10, shuffle=False, prefetch=3)
    first = next(loader)
    assert first["tokens"][:, 0].tolist() == list(range(10))
    deadline = time.monotonic() + 300
    while len(source.read) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    # One handed out, three waiting, one in the making or waiting for room.
    assert len(source.read) == 50
    time.sleep(0.05)
    assert len(source.read) == 50
    assert loader.step == 1
    assert loader.state_dict()["sources"]["tokens"]["cursor"] == [0, 10]
    assert loader.accounting()["tokens"]["tokens"] == 80
    loader.close()
    assert next(loader)["tokens"][:, 0].tolist() == list(range(10, 20))
    loader.close()
    loader.close()


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("titan-data")]


def test_no_thread_outlives_its_loader() -> None:
    before = len(prefetch_threads())
    loader = open_loader(ListSource(TEXTS), prefetch=2, workers=2)
    next(loader)
    assert len(prefetch_threads()) > before
    loader.close()
    assert not any(thread.name == "titan-data-prefetch" for thread in prefetch_threads())
    next(loader)
    del loader
    gc.collect()
    deadline = time.monotonic() + 300
    while len(prefetch_threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(prefetch_threads()) == before


@pytest.mark.slow
def test_a_process_ends_though_a_loader_is_reading_ahead() -> None:
    code = (
        "from titan_data import *\n"
        "loader = Loader(ListSource(['abc'] * 99), ByteTokenizer(), seq_len=64, global_batch_size=64, "
        "read_ahead=ReadAhead(workers=2))\n"
        "next(loader)\n"
        "print('done')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert (result.stdout, result.stderr) == ("done\n", "")


class Hanging(ListTokens):
    """A source whose reads hang, but for the first `spare` of them, until the storage is back."""

    spare = 8

    def __init__(self, documents: list[Any]) -> None:
        super().__init__(documents)
        self.hangs, self.back = threading.Event(), threading.Event()

    def __getitem__(self, index: int) -> str:
        self.spare -= 1
        if self.spare < 0:
            self.hangs.set()
            self.back.wait(600)
        return super().__getitem__(index)


def test_a_read_that_hangs_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("titan_data.loader._CLOSE_SECONDS", 0.05)
    source = Hanging([[i] * 8 for i in range(100)])
    loader = flat_loader(source, None, seq_len=8, global_batch_size=8, shuffle=False)
    start = loader.state_dict()
    first = next(loader)
    state = loader.state_dict()
    assert source.hangs.wait(600)
    message = r"a read has been hanging for 0.05 s: check that the storage is reachable.* still at step 1"
    with pytest.raises(DataError, match=message):
        loader.load_state_dict(start)
    with pytest.raises(DataError, match=message):
        next(loader)
    loader.close()
    assert "a read has been hanging" in caplog.text
    assert loader.state_dict() == state
    source.back.set()  # the storage is there again
    monkeypatch.setattr("titan_data.loader._CLOSE_SECONDS", 60.0)
    assert next(loader)["tokens"][:, 0].tolist() == list(range(8, 16))
    loader.load_state_dict(start)
    assert torch.equal(next(loader)["tokens"], first["tokens"])
    loader.close()


class Warned(logging.Handler):
    """Keeps the loader's warnings; calls `act` once one of them is what `wanted` says."""

    def __init__(self, wanted: Callable[[list[str]], bool], act: Callable[[], object] | None) -> None:
        super().__init__()
        self.messages, self.wanted, self.act = [], wanted, act

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if self.act is not None and self.wanted(self.messages):
            self.act, act = None, self.act
            act()

    def __enter__(self) -> "Warned":
        logging.getLogger("titan_data.loader").addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("titan_data.loader").removeHandler(self)


def test_a_batch_that_does_not_come_is_warned_of_and_comes_when_the_storage_is_back() -> None:
    source = Hanging([[i] * 8 for i in range(100)])
    loader = flat_loader(source, None, seq_len=8, global_batch_size=8, shuffle=False, patience=0.01)
    next(loader)
    with Warned(lambda messages: len(messages) == 3, source.back.set) as warned:
        assert next(loader)["tokens"][:, 0].tolist() == list(range(8, 16))
    assert [message.partition(",")[0] for message in warned.messages[:3]] == [
        f"no batch for {seconds} s: step 1 is being read" for seconds in (0.01, 0.02, 0.04)
    ]
    loader.close()
    with pytest.raises(DataError, match="patience must be more than 0"):
        flat_loader(source, None, seq_len=8, global_batch_size=8, patience=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_the_warning_names_the_file_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "part-1.txt"
    path.write_text("one\ntwo\n")
    loader = flat_loader(
        flat_files(path, text_unit="line"), ByteTokenizer(), seq_len=4, global_batch_size=1, patience=0.01
    )
    path.unlink()
    os.mkfifo(path)  # opening it waits for somebody who writes
    writer = threading.Thread(target=path.write_bytes, args=(b"",), daemon=True)
    warned = Warned(lambda messages: messages[-1].endswith(f", in {path}"), writer.start)
    with warned, pytest.raises(DataError, match=r"part-1\.txt could not be read at byte 0"):  # as it is a pipe
        next(loader)
    assert all(message.startswith("no batch for ") for message in warned.messages)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_read_leaves_the_step_before(kind: str, prefetch: int, workers: int) -> None:
    expected = open_loader(flaky(kind))
    digests = [digest([next(expected)]) for _ in range(60)]
    source = flaky(kind)
    loader = open_loader(source, prefetch=prefetch, workers=workers)
    got = [digest([next(loader)]) for _ in range(3)]
    source.broken, source.spare = True, 20
    with pytest.raises(OSError, match="away"):
        got.extend(digest([batch]) for batch in loader)
    state = loader.state_dict()
    assert state["step"] == len(got) < 60
    with pytest.raises(OSError, match="away"):
        next(loader)
    assert loader.state_dict() == state
    source.broken = False
    while len(got) < 60:
        got.append(digest([next(loader)]))
    assert got == digests
    resumed = open_loader(flaky(kind))
    resumed.load_state_dict(state)
    assert [digest([next(resumed)]) for _ in range(60 - state["step"])] == digests[state["step"] :]


@pytest.mark.parametrize("kind", ["texts", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_fails_once_loses_nothing(kind: str, workers: int) -> None:
    # A generator that has raised looks like one that has come to its end: the rest of its shard must not be lost.
    expected = open_loader(flaky(kind))
    digests = [digest([next(expected)]) for _ in range(12)]
    for spare in range(20):
        source = flaky(kind)
        source.broken, source.spare, source.once = True, spare, True
        loader = open_loader(source, workers=workers)
        got = []
        while len(got) < 12:
            with contextlib.suppress(OSError):
                got.append(digest([next(loader)]))
        assert not source.broken
        assert got == digests


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tokenizer_that_fails_once_loses_nothing(workers: int) -> None:
    class Nervous(ByteTokenizer):
        failed = False

        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            if not self.failed and "document 00050" in texts:
                self.failed = True
                raise MemoryError("too little memory")
            return super().encode_batch(texts)

    # Each step is what is tokenized at once: so the place of the failure is one where the feed already stands.
    source = ListSource([f"document {i:05}" for i in range(200)])
    loader = flat_loader(
        source, Nervous(), seq_len=16, global_batch_size=16, shuffle=False, prefetch=0, workers=workers
    )
    read = []
    while len(read) < 12 * 16:
        with contextlib.suppress(MemoryError):
            read += [bytes(row[1:-1]).decode() for row in next(loader)["tokens"].tolist()]
    assert read == [source[i] for i in range(12 * 16)]


def test_what_lies_before_a_bad_record_is_handed_out_first() -> None:
    class Bad(ListSource):
        def __getitem__(self, index: int) -> str:
            if index == 30:
                raise DataError("corpus.jsonl, line 31: no JSON")
            return super().__getitem__(index)

    for workers in (0, 2):
        loader = open_loader(Bad(["a" * 14] * 40), global_batch_size=5, shuffle=False, prefetch=2, workers=workers)
        for _ in range(6):
            next(loader)
        with pytest.raises(DataError, match="line 31"):
            next(loader)
        assert loader.step == 6


# ---- how little is read ----


def test_a_rank_reads_only_its_own_documents() -> None:
    # Lengths of all, tokens of its own sequences: of token sources no rank reads what another rank trains on.
    documents = [[i] * 8 for i in range(800)]
    read = []
    for rank in range(4):
        source = ListTokens(documents)
        loader = flat_loader(source, None, seq_len=8, global_batch_size=8, rank=rank, world_size=4, prefetch=0)
        for _ in range(100):
            next(loader)
        read.append(source.read)
    assert [len(one) for one in read] == [200] * 4
    assert set.union(*read) == set(range(800))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_resume_reads_no_more_far_into_a_run_than_at_its_beginning(packing: str) -> None:
    class Endless:
        """A thousand million documents of 100 tokens that take no room."""

        name, tokenizer_fingerprint, looked_up = "endless", None, 0

        def fingerprint(self) -> Fingerprint:
            return Fingerprint.of("endless", [])

        def __len__(self) -> int:
            return 10**9

        def lengths(self, indices: Any) -> Any:
            Endless.looked_up += len(indices)
            return torch.full((len(indices),), 100).numpy()

        def __getitem__(self, index: int) -> Any:
            return torch.full((100,), index).numpy()

    def loader() -> Loader:
        return flat_loader(
            Endless(), None, seq_len=1000, global_batch_size=8, packing=Packing(packing, packing_window=160)
        )

    # A million steps of 80 documents.
    far = ReaderState(1_000_000, 0, (SourceState(PackerState((0, 80_000_000))),))
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(dump_state(far, resumed._settings))))
    # A window's sequences are shuffled; the first one is of one of the 160 documents there.
    ahead = 160 if packing == "best_fit" else 1
    expected = Permutation(10**9, "0/endless/0").entries(80_000_000, 80_000_000 + ahead)
    assert int(next(resumed)["tokens"][0, 0]) in expected
    resumed.close()
    assert resumed.step == 1_000_001
    assert Endless.looked_up <= 4 * 1024
    assert len(json.dumps(resumed.state_dict())) < 2000


def test_resuming_texts_reads_a_few_documents() -> None:
    class Counting(ListSource):
        reads = 0

        def __getitem__(self, index: int) -> str:
            Counting.reads += 1
            return super().__getitem__(index)

    loader = open_loader(Counting(["x" * 10] * 1000), global_batch_size=4, seq_len=100)
    for _ in range(20):
        next(loader)
    assert Counting.reads >= 20 * 400 // 12
    Counting.reads = 0
    resumed = open_loader(Counting(["x" * 10] * 1000), global_batch_size=4, seq_len=100)
    resumed.load_state_dict(loader.state_dict())
    next(resumed)
    assert Counting.reads <= 400 // 12 + 32


# ---- refusals ----


def test_changed_settings_are_refused_and_all_of_them_listed() -> None:
    state = open_loader(ListSource(["abc"]), seed=1).state_dict()

    class Other(ByteTokenizer):
        fingerprint = "other"

    loader = flat_loader(
        ListSource(["abcd"]),
        Other(),
        seq_len=17,
        global_batch_size=4,
        seed=2,
        shuffle=False,
        packing=Packing("one_per_row"),
    )
    with pytest.raises(DataError) as caught:
        loader.load_state_dict(state)
    message = str(caught.value)
    for line in (
        "seq_len: saved 16, now 17",
        "global_batch_size: saved 8, now 4",
        "seed: saved 1, now 2",
        "shuffle: saved True, now False",
        "tokenizer: saved 'titan-data/bytes/1', now 'other'",
        "packing.kind: saved 'concat', now 'one_per_row'",
        "data of source 'list': edited: document 0",
        "Resume with the saved settings, or start a new run in a new folder.",
        "allow_changes={'data', 'global_batch_size', 'packing', 'seed', 'seq_len', 'shuffle', 'tokenizer'}",
    ):
        assert line in message
    assert loader.step == 0


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"seq_len": 8},
        {"global_batch_size": 16},
        {"shuffle": False},
        {"packing": Packing(cross_document=True)},
        {"packing": Packing("best_fit")},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_setting_is_named_alone_and_can_be_allowed(kind: str, change: dict[str, Any]) -> None:
    loader = open_loader(make_source(kind, TEXTS))
    for _ in range(4):
        next(loader)
    state = loader.state_dict()
    changed = open_loader(make_source(kind, TEXTS), **change)
    if kind == "stream" and change == {"shuffle": False}:
        change = {}  # a stream is never shuffled: but the setting is the loader's, and it is one for all sources
    (name,) = change or {"shuffle"}
    with pytest.raises(DataError) as caught:
        changed.load_state_dict(state)
    assert {line.split(":")[0].split(".")[0].strip() for line in str(caught.value).splitlines()[1:-1]} == {name}
    assert changed.step == 0
    with pytest.raises(DataError):
        changed.load_state_dict(state, allow_changes={"data", "mixture"})
    changed.load_state_dict(state, allow_changes={name})
    batch = next(changed)
    assert changed.step == 5
    assert changed.accounting()["source"]["tokens"] == 4 * 128 + (batch["labels"].numel() - padding(changed))
    if name in ("seq_len", "global_batch_size"):
        assert batch["tokens"][0, :8].tolist() == next(loader)["tokens"][0, :8].tolist(), "the place is the same"


def padding(loader: Loader) -> int:
    return loader.accounting()["source"]["padding"]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_changed_data_are_refused_with_the_list_and_can_be_allowed(packing: str) -> None:
    def loader_of(documents: list[Any]) -> Loader:
        packed = Packing(packing, packing_window=8)
        return flat_loader(ListTokens(documents), None, seq_len=16, global_batch_size=4, packing=packed, prefetch=0)

    documents = encoded(TEXTS)
    loader = loader_of(documents)
    for _ in range(7):
        next(loader)
    state = loader.state_dict()
    for changed, line in (
        ([*documents[:3], [1, 2, 3], *documents[4:]], "edited: document 3"),
        ([*documents, [1]], "added: document 40"),
        (documents[:-2], "removed: document 38, document 39"),
        ([[1]] * 40, "edited: document 0, document 1, document 2"),
        ([[1]], "removed: document 1, document 2"),
    ):
        other = loader_of(changed)
        with pytest.raises(DataError, match=f"data of source 'tokens': {line}") as caught:
            other.load_state_dict(state)
        assert "allow_changes={'data'}" in str(caught.value)
        assert isinstance(caught.value, ChangedDataError)
        assert caught.value.changes == ("data",)
        other.load_state_dict(state, allow_changes=["data"])
        next(other)
        assert other.step == 8


def test_a_stream_that_is_cut_up_otherwise_is_refused_for_good() -> None:
    loader = open_loader(ListStream([["a"] * 9, ["b"] * 9]))
    next(loader)
    other = open_loader(ListStream([["a"] * 9, ["b"] * 9, ["c"]]))
    with pytest.raises(DataError, match="added: shard 2"):
        other.load_state_dict(loader.state_dict())
    with pytest.raises(
        DataError, match="has 3 shards, but the saved cursor is of 2 shards: give the source another name"
    ):
        other.load_state_dict(loader.state_dict(), allow_changes={"data"})
    assert other.step == 0


def test_data_that_change_behind_their_fingerprint_are_noticed() -> None:
    class Same(ListStream):
        def fingerprint(self) -> Fingerprint:
            return Fingerprint.of("same", [])

    for packing in ("concat", "best_fit"):
        loader = open_loader(Same([["a" * 50] * 20]), packing=Packing(packing))
        next(loader)
        changed = open_loader(Same([["a"]]), packing=Packing(packing))
        changed.load_state_dict(loader.state_dict())
        with pytest.raises(DataError, match="the data have changed"):
            next(changed)


def test_corrupt_states_are_refused_and_leave_the_loader_alone() -> None:
    loader = open_loader(ListSource(["abc" * 30, "de" * 20]))
    next(loader)
    good = loader.state_dict()
    source = good["sources"]["list"]
    for change in (
        {"version": 2},
        {"settings": None},
        {"step": 7},
        {"checksum": "0"},
        {"phases": []},
        {"sources": {"list": {**source, "offset": source["offset"] + 1}}},
        {"sources": {}},
    ):
        with pytest.raises(DataError, match=r"is corrupt|version 2"):
            loader.load_state_dict({**good, **change})
        assert loader.state_dict() == good
    with pytest.raises(DataError, match="version None"):
        loader.load_state_dict({})
    with pytest.raises(DataError, match=r"allow_changes: unknown 'everything'; choose from data, mixture, "):
        loader.load_state_dict(good, allow_changes={"everything"})


def test_a_state_with_its_keys_in_another_order_is_the_same_state() -> None:
    loader = open_loader(ListSource(TEXTS))
    next(loader)
    state = loader.state_dict()
    reordered = json.loads(json.dumps(state, sort_keys=True))
    assert list(reordered) != list(state)
    resumed = open_loader(ListSource(TEXTS))
    resumed.load_state_dict(reordered)
    assert resumed.state_dict() == state
    assert digest([next(resumed)]) == digest([next(loader)])


# ---- bad input ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_without_tokens_ends_in_an_error(kind: str) -> None:
    with pytest.raises(DataError, match="has no documents"):
        next(open_loader(make_source(kind, [])))
    with pytest.raises(DataError, match="'source' has no tokens in a full epoch"):
        next(open_loader(make_source(kind, ["", "", ""])))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_documents_are_passed_over_and_counted(kind: str) -> None:
    sparse = open_loader(make_source(kind, ["", "", "", "a", "b", "c", "", "", ""]), shuffle=False)
    dense = open_loader(make_source(kind, ["a", "b", "c"]), shuffle=False)
    for _ in range(3):
        assert digest([next(sparse)]) == digest([next(dense)])
    passed, documents = (sparse.accounting()["source"][key] for key in ("skipped", "documents"))
    assert passed in range(documents * 2 - 3, documents * 2 + 7)
    assert dense.accounting()["source"]["skipped"] == 0


@pytest.mark.slow
def test_a_document_of_50_megabytes() -> None:
    text = "0123456789" * 5_000_000
    loader = open_loader(ListSource(["before", text, "after"]), seq_len=4096, global_batch_size=2, shuffle=False)
    batch = next(loader)
    state = loader.state_dict()
    following = next(loader)
    assert batch["tokens"][0, 9].item() == ord("0")
    assert int(batch["positions"].max()) <= 4095
    resumed = open_loader(ListSource(["before", text, "after"]), seq_len=4096, global_batch_size=2, shuffle=False)
    resumed.load_state_dict(state)
    assert digest([next(resumed)]) == digest([following])


def test_lone_surrogates_do_not_stop_a_run() -> None:
    batch = next(open_loader(ListSource(["a\ud800b"]), seq_len=5, global_batch_size=1))
    assert batch["tokens"].tolist() == [[256, 97, 63, 98, 257]]


def test_tokens_of_another_tokenizer_are_refused() -> None:
    made = ListTokens([[1]], "made", tokenizer_fingerprint="other")
    with pytest.raises(DataError, match="source 'made' was made with tokenizer 'other', but the loader's is 'titan"):
        open_loader(made)
    with pytest.raises(DataError, match="source 'made' was made with tokenizer 'other', but that of source 'first'"):
        flat_loader(
            [MixtureSource(ListTokens([[1]], "first", tokenizer_fingerprint="this")), MixtureSource(made)],
            None,
            seq_len=1,
            global_batch_size=1,
        )
    flat_loader(
        ListTokens([[1]], tokenizer_fingerprint=ByteTokenizer.fingerprint),
        ByteTokenizer(),
        seq_len=1,
        global_batch_size=1,
    )


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(DataError, match="source 'list' contains text, so the loader needs a tokenizer"):
        flat_loader(ListSource(["a"]), None, seq_len=1, global_batch_size=1)


def test_a_token_source_that_contradicts_itself() -> None:
    class Wrong(ListTokens):
        def lengths(self, indices: Any) -> Any:
            return super().lengths(indices) + self.add

    for add, message in ((1, r"document 0 has shape \(2,\), but its source reports 3"), (-3, "non-negative")):
        Wrong.add = add
        with pytest.raises(DataError, match=message):
            next(flat_loader(Wrong([[1, 2]]), None, seq_len=2, global_batch_size=1))


def test_sizes_that_do_not_fit_name_numbers_that_do() -> None:
    source = ListSource(["a"])
    with pytest.raises(
        DataError, match=r"global_batch_size = 10 .* world_size = 4 ranks; use global_batch_size = 8 or 12"
    ):
        open_loader(source, global_batch_size=10, world_size=4)
    with pytest.raises(DataError, match=r"use global_batch_size = 4$"):
        open_loader(source, global_batch_size=3, world_size=4)
    for name in ("seq_len", "global_batch_size", "world_size"):
        with pytest.raises(DataError, match=f"{name} must be at least 1, not 0"):
            open_loader(source, **{name: 0})
    for name in ("prefetch", "workers"):
        with pytest.raises(DataError, match=f"{name} must be at least 0, not -1"):
            open_loader(source, **{name: -1})
    for rank in (-1, 2):
        with pytest.raises(DataError, match=rf"rank must be in 0\.\.1 for world_size = 2, not {rank}"):
            open_loader(source, rank=rank, world_size=2)


def test_plain_lists_and_iterables_are_no_sources() -> None:
    for thing in (["a", "b"], "text", 5, iter(["a"])):
        with pytest.raises(DataError, match="use ListSource, for any iterable IterableSource"):
            open_loader(thing)
    batch = next(open_loader(IterableSource(lambda: (str(i) for i in range(9))), seq_len=6, global_batch_size=1))
    assert batch["tokens"].tolist() == [[256, 48, 257, 256, 49, 257]]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_pinned_memory_needs_an_accelerator() -> None:
    with pytest.raises(DataError, match="pin_memory=True needs an accelerator"):
        open_loader(ListSource(["a"]), pin_memory=True)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_pinned_memory(prefetch: int) -> None:
    batch = next(open_loader(ListSource(TEXTS), pin_memory=True, prefetch=prefetch))
    assert all(value.is_pinned() for value in batch.values() if isinstance(value, torch.Tensor))
    assert digest([batch]) == digest([next(open_loader(ListSource(TEXTS)))])


def test_numbers_of_numpy_make_a_state_in_json() -> None:
    def settings(number: Any, fraction: Any) -> dict[str, Any]:
        return {
            "seq_len": number(16),
            "global_batch_size": number(4),
            "seed": number(7),
            "packing": Packing("best_fit", packing_window=number(8)),
            "phases": [Phase(number(2), {"a": fraction(0.5), "b": fraction(0.5)}, number(24))],
        }

    def opened(number: Any, fraction: Any) -> Loader:
        sources = [
            MixtureSource(ListSource([f"{name} {i}" * 9 for i in range(20)], name), fraction(0.5), number(9))
            for name in ("a", "b")
        ]
        return flat_loader(sources, ByteTokenizer(), prefetch=0, **settings(number, fraction))

    plain, numpy = opened(int, float), opened(np.int64, np.float64)
    for _ in range(4):
        assert next(plain)["tokens"].tolist() == next(numpy)["tokens"].tolist()
    assert json.dumps(numpy.state_dict()) == json.dumps(plain.state_dict())
    with pytest.raises(DataError, match=r"seq_len must be an integer, not 1\.5"):
        flat_loader(ListSource(["a"]), ByteTokenizer(), seq_len=1.5, global_batch_size=1)


def test_a_panic_in_a_tokenizer_is_told_with_the_document() -> None:
    source = ListSource([f"document {i} " for i in range(60)])
    loader = flat_loader(source, PanickingTokenizer(), seq_len=64, global_batch_size=4, shuffle=False, prefetch=0)
    with pytest.raises(DataError, match=r"document at cursor \[0, 34\] cannot be tokenized: PanicError"):
        list(loader)
