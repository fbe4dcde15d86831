"""Ranks of one machine tokenize each text once, and the batches are those that each would make alone."""

import gc
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_flat import flat_loader
from data_loader_cases import GLOBAL_BATCH_SIZE, digest, make_source, run_in_parts
from titan_data import ByteTokenizer, DataError, Loader, Packing
from titan_data.batching import shared_tokens
from titan_data.batching.documents import encode_documents
from titan_data.batching.shared_tokens import SharedTokens

TEXTS = [f"document {i} " * (i % 7) for i in range(60)]


class Counting(ByteTokenizer):
    """Counts the texts that are tokenized."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.texts += texts
        return super().encode_batch(texts)


def ranks(folder: Path, tokenizers: list[Any], **settings: Any) -> list[Loader]:
    texts = [f"document {i} " * (i % 7) for i in range(900)]  # more than are read ahead
    return [
        flat_loader(
            make_source("texts", texts),
            tokenizer,
            **{"seq_len": 32, "global_batch_size": GLOBAL_BATCH_SIZE, "prefetch": 0, **settings},
            share_directory=folder,
            rank=rank,
            world_size=len(tokenizers),
        )
        for rank, tokenizer in enumerate(tokenizers)
    ]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_text_is_tokenized_once_for_all_ranks(tmp_path: Path, workers: int, prefetch: int) -> None:
    tokenizers = [Counting() for _ in range(4)]
    one = Counting()
    alone = ranks(None, [one])[0]
    loaders = ranks(tmp_path / "share", tokenizers, workers=workers, prefetch=prefetch)
    for _ in range(6):
        assert digest([next(loader) for loader in loaders]) == digest([next(alone)])
    for loader in loaders:
        loader.close()
    texts = [text for tokenizer in tokenizers for text in tokenizer.texts if text]
    assert len(texts) == len({*texts}), "a text was tokenized twice"
    assert {*filter(None, one.texts)} <= {*texts}
    del loaders, loader
    deadline = time.monotonic() + 300
    while (tmp_path / "share").exists() and time.monotonic() < deadline:  # workers finish what they are at
        gc.collect()
        time.sleep(0.01)
    assert not (tmp_path / "share").exists(), "nothing should be left behind"


def test_peers_of_one_data_rank_share_too(tmp_path: Path) -> None:
    # Ranks of one tensor- or pipeline-parallel group pass the same rank, and get the same sequences.
    tokenizers = [Counting() for _ in range(3)]
    peers = [ranks(tmp_path / "share", [tokenizer])[0] for tokenizer in tokenizers]
    for _ in range(3):
        assert len({digest([next(peer)]) for peer in peers}) == 1
    assert [bool(tokenizer.texts) for tokenizer in tokenizers] == [True, False, False]


@pytest.mark.parametrize("kind", ["texts", "stream"])
def test_ranks_that_stop_and_resume_share(tmp_path: Path, kind: str) -> None:
    def make_loader(share: bool = True, **place: Any) -> Loader:
        folder = tmp_path / "share" if share else None
        source, packing = make_source(kind, TEXTS), Packing("best_fit", packing_window=7)
        return flat_loader(
            source,
            ByteTokenizer(),
            seq_len=24,
            global_batch_size=GLOBAL_BATCH_SIZE,
            packing=packing,
            share_directory=folder,
            **place,
        )

    parts = [
        (2, 0, 2, GLOBAL_BATCH_SIZE, 3),
        (4, 2, 0, GLOBAL_BATCH_SIZE, 4),
        (1, 0, 0, GLOBAL_BATCH_SIZE, 2),
        (3, 2, 2, GLOBAL_BATCH_SIZE, 3),
    ]
    alone = run_in_parts(lambda **place: make_loader(share=False, **place), [(1, 0, 0, GLOBAL_BATCH_SIZE, 12)])
    assert run_in_parts(make_loader, parts) == alone


def same(found: list[Any], texts: list[str]) -> bool:
    expected = encode_documents(ByteTokenizer(), texts)
    return [document.tolist() for document in found] == [document.tolist() for document in expected]


def test_any_texts_come_back_as_they_are(tmp_path: Path) -> None:
    shares = [SharedTokens(tmp_path, ByteTokenizer()) for _ in range(2)]
    for texts in (["", "a", ""], ["ab", "c"], ["a", "bc"], ["abc"], ["\ud800", "ü" * 9999]):
        for share in shares:
            assert same(share.encode(texts), texts)
    assert len(list(tmp_path.glob("*.ids"))) == 5


def test_another_tokenizer_has_files_of_its_own(tmp_path: Path) -> None:
    class Other(ByteTokenizer):
        fingerprint = "other"

        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[1, 2, 3] for _ in texts]

    share, other = (SharedTokens(tmp_path, tokenizer) for tokenizer in (ByteTokenizer(), Other()))
    assert same(share.encode(["text"]), ["text"])
    assert other.encode(["text"])[0].tolist() == [256, 1, 2, 3, 257]


def test_one_tokenizes_and_the_other_waits(tmp_path: Path) -> None:
    go, begun = threading.Event(), threading.Event()

    class Slow(Counting):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            begun.set()
            assert go.wait(60)
            return super().encode_batch(texts)

    slow, other = Slow(), Counting()
    found = {}
    shares = {"slow": SharedTokens(tmp_path, slow), "other": SharedTokens(tmp_path, other)}

    def encode(who: int) -> None:
        found[who] = shares[who].encode(["text"])

    threads = [threading.Thread(target=encode, args=[who]) for who in shares]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    time.sleep(0.05)
    assert not found
    go.set()
    for thread in threads:
        thread.join(60)
    assert (slow.texts, other.texts) == (["text"], [])
    assert same(found["slow"], ["text"])
    assert same(found["other"], ["text"])


@pytest.mark.parametrize("age", [0.0, 1e6])
def test_a_claim_of_one_who_is_no_more_holds_nobody_up(
    tmp_path: Path, age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fresh one is waited for as long as patience lasts, an old one not at all.
    if age == 0:
        monkeypatch.setattr(shared_tokens, "_PATIENCE_SECONDS", 0.05)
    else:
        monkeypatch.setattr(shared_tokens.time, "sleep", lambda seconds: pytest.fail("it waits"))
    share = SharedTokens(tmp_path, ByteTokenizer())
    claim = (tmp_path / share._name(["text"])).with_suffix(".claim")
    claim.touch()
    os.utime(claim, (time.time() - age,) * 2)
    assert same(share.encode(["text"]), ["text"])


@pytest.mark.parametrize("damage", [b"", b"\1\0\0\0", b"\1\0\0\0\6\0\0\0\0", b"\2\0\0\0\0\0\0\0\0\0\0\0"])
def test_a_corrupt_file_is_not_believed(tmp_path: Path, damage: bytes) -> None:
    share = SharedTokens(tmp_path, ByteTokenizer())
    path = tmp_path / share._name(["text"])
    path.write_bytes(damage)
    assert same(share.encode(["text"]), ["text"])
    assert len(np.fromfile(path, dtype=np.int32)) == 2 + 6, "and is replaced"


def test_old_files_and_too_many_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tokens, "_KEPT_BYTES", 100)
    stranger, old = tmp_path / "mine.txt", tmp_path / "0123.ids"
    for path in (stranger, old):
        path.touch()
        os.utime(path, (0, 0))
    share = SharedTokens(tmp_path, ByteTokenizer())
    assert (stranger.exists(), old.exists()) == (True, False)
    for i in range(20):
        share.encode([f"text {i}"])  # of 40 bytes each
    assert len(list(tmp_path.glob("*.ids"))) == 2
    del share
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_where_files_cannot_be_written_each_tokenizes_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share = SharedTokens(tmp_path / "share", ByteTokenizer())
    (tmp_path / "share").rmdir()
    for _ in range(2):
        assert same(share.encode(["text"]), ["text"])
    assert caplog.text.count("tokens cannot be shared in") == 1


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"share_directory .*file/share cannot be used: Not a directory"):
        SharedTokens(tmp_path / "file" / "share", ByteTokenizer())


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give folders away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(DataError, match="belongs to another user"):
        SharedTokens(tmp_path, ByteTokenizer())


def test_ready_made_tokens_need_no_folder(tmp_path: Path) -> None:
    loader = flat_loader(
        make_source("tokens", TEXTS),
        ByteTokenizer(),
        seq_len=8,
        global_batch_size=2,
        share_directory=tmp_path / "share",
    )
    next(loader)
    loader.close()
    assert not (tmp_path / "share").exists()
    assert json.dumps(loader.state_dict())
