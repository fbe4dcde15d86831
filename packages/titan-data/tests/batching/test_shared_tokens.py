"""Ranks of one machine tokenize each text once, and the batches are those that each would make alone."""

import gc
import json
import os
import threading
import time

import numpy as np
import pytest

from data_loader_cases import ROWS, digest, make_source, run_in_parts
from titan_data import ByteTokenizer, DataError, Loader, Packing
from titan_data.batching import shared_tokens
from titan_data.batching.documents import encode_documents
from titan_data.batching.shared_tokens import TokenShare

TEXTS = [f"document {i} " * (i % 7) for i in range(60)]


class Counting(ByteTokenizer):
    """Counts the texts that are tokenized."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def encode_batch(self, texts):
        self.texts += texts
        return super().encode_batch(texts)


def ranks(folder, tokenizers, **settings):
    texts = [f"document {i} " * (i % 7) for i in range(900)]  # more than are read ahead
    return [
        Loader(
            make_source("texts", texts),
            tokenizer,
            **{"seq_len": 32, "global_batch_size": ROWS, "prefetch": 0, **settings},
            share_folder=folder,
            rank=rank,
            world=len(tokenizers),
        )
        for rank, tokenizer in enumerate(tokenizers)
    ]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_text_is_tokenized_once_for_all_ranks(tmp_path, workers, prefetch):
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


def test_peers_of_one_data_rank_share_too(tmp_path):
    # Ranks of one tensor- or pipeline-parallel group give the same rank, and get the same rows.
    tokenizers = [Counting() for _ in range(3)]
    peers = [ranks(tmp_path / "share", [tokenizer])[0] for tokenizer in tokenizers]
    for _ in range(3):
        assert len({digest([next(peer)]) for peer in peers}) == 1
    assert [bool(tokenizer.texts) for tokenizer in tokenizers] == [True, False, False]


@pytest.mark.parametrize("kind", ["texts", "stream"])
def test_ranks_that_stop_and_resume_share(tmp_path, kind):
    def make_loader(share=True, **place):
        folder = tmp_path / "share" if share else None
        source, packing = make_source(kind, TEXTS), Packing("best_fit", look_ahead=7)
        return Loader(
            source, ByteTokenizer(), seq_len=24, global_batch_size=ROWS, packing=packing, share_folder=folder, **place
        )

    parts = [(2, 0, 2, ROWS, 3), (4, 2, 0, ROWS, 4), (1, 0, 0, ROWS, 2), (3, 2, 2, ROWS, 3)]
    alone = run_in_parts(lambda **place: make_loader(share=False, **place), [(1, 0, 0, ROWS, 12)])
    assert run_in_parts(make_loader, parts) == alone


def same(found, texts):
    expected = encode_documents(ByteTokenizer(), texts)
    return [document.tolist() for document in found] == [document.tolist() for document in expected]


def test_any_texts_come_back_as_they_are(tmp_path):
    shares = [TokenShare(tmp_path, ByteTokenizer()) for _ in range(2)]
    for texts in (["", "a", ""], ["ab", "c"], ["a", "bc"], ["abc"], ["\ud800", "ü" * 9999]):
        for share in shares:
            assert same(share.encode(texts), texts)
    assert len(list(tmp_path.glob("*.ids"))) == 5


def test_another_tokenizer_has_files_of_its_own(tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

        def encode_batch(self, texts):
            return [[1, 2, 3] for _ in texts]

    share, other = (TokenShare(tmp_path, tokenizer) for tokenizer in (ByteTokenizer(), Other()))
    assert same(share.encode(["text"]), ["text"])
    assert other.encode(["text"])[0].tolist() == [256, 1, 2, 3, 257]


def test_one_tokenizes_and_the_other_waits(tmp_path):
    go, begun = threading.Event(), threading.Event()

    class Slow(Counting):
        def encode_batch(self, texts):
            begun.set()
            assert go.wait(60)
            return super().encode_batch(texts)

    slow, other = Slow(), Counting()
    found = {}
    shares = {"slow": TokenShare(tmp_path, slow), "other": TokenShare(tmp_path, other)}

    def encode(who):
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
def test_a_claim_of_one_who_is_no_more_holds_nobody_up(tmp_path, age, monkeypatch):
    # A fresh one is waited for as long as patience lasts, an old one not at all.
    if age == 0:
        monkeypatch.setattr(shared_tokens, "_PATIENCE_SECONDS", 0.05)
    else:
        monkeypatch.setattr(shared_tokens.time, "sleep", lambda seconds: pytest.fail("it waits"))
    share = TokenShare(tmp_path, ByteTokenizer())
    claim = (tmp_path / share._name(["text"])).with_suffix(".claim")
    claim.touch()
    os.utime(claim, (time.time() - age,) * 2)
    assert same(share.encode(["text"]), ["text"])


@pytest.mark.parametrize("damage", [b"", b"\1\0\0\0", b"\1\0\0\0\6\0\0\0\0", b"\2\0\0\0\0\0\0\0\0\0\0\0"])
def test_a_damaged_file_is_not_believed(tmp_path, damage):
    share = TokenShare(tmp_path, ByteTokenizer())
    path = tmp_path / share._name(["text"])
    path.write_bytes(damage)
    assert same(share.encode(["text"]), ["text"])
    assert len(np.fromfile(path, dtype=np.int32)) == 2 + 6, "and is replaced"


def test_old_files_and_too_many_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_tokens, "_KEPT_BYTES", 100)
    stranger, old = tmp_path / "mine.txt", tmp_path / "0123.ids"
    for path in (stranger, old):
        path.touch()
        os.utime(path, (0, 0))
    share = TokenShare(tmp_path, ByteTokenizer())
    assert (stranger.exists(), old.exists()) == (True, False)
    for i in range(20):
        share.encode([f"text {i}"])  # of 40 bytes each
    assert len(list(tmp_path.glob("*.ids"))) == 2
    del share
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_where_files_cannot_be_written_each_tokenizes_for_itself(tmp_path, caplog):
    share = TokenShare(tmp_path / "share", ByteTokenizer())
    (tmp_path / "share").rmdir()
    for _ in range(2):
        assert same(share.encode(["text"]), ["text"])
    assert caplog.text.count("tokens cannot be shared in") == 1


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the folder .*file/share to share tokens in cannot be used: Not a directory"):
        TokenShare(tmp_path / "file" / "share", ByteTokenizer())


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give folders away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(DataError, match="belongs to another user"):
        TokenShare(tmp_path, ByteTokenizer())


def test_ready_made_tokens_need_no_folder(tmp_path):
    loader = Loader(
        make_source("tokens", TEXTS), ByteTokenizer(), seq_len=8, global_batch_size=2, share_folder=tmp_path / "share"
    )
    next(loader)
    loader.close()
    assert not (tmp_path / "share").exists()
    assert json.dumps(loader.state_dict())
