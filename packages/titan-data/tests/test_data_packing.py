"""What is in a batch, checked against a slow reference that goes token by token."""

from collections import Counter
from itertools import count, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_data import ByteTokenizer, DataError, ListSource, Loader, Permutation

texts = st.lists(st.text(max_size=25), min_size=1, max_size=8).filter(any)


class PlainTokenizer(ByteTokenizer):
    """Bytes with the special tokens of choice."""

    fingerprint = "plain"

    def __init__(self, bos_id, eos_id):
        self.bos_id = bos_id
        self.eos_id = eos_id


tokenizers = st.sampled_from([ByteTokenizer(), *(PlainTokenizer(b, e) for b in (None, 256) for e in (None, 257))])


def order(n, epoch, shuffle, seed=0):
    """Which document of the corpus comes at each place of an epoch."""
    return Permutation(n, f"{seed}/{epoch}") if shuffle else range(n)


def reference_documents(corpus, tokenizer, seed, shuffle):
    """Every document of the endless queue, as a list of ids."""
    for epoch in count():
        for index in order(len(corpus), epoch, shuffle, seed):
            if corpus[index]:
                ids = [tokenizer.bos_id, *corpus[index].encode(), tokenizer.eos_id]
                yield [token for token in ids if token is not None]


def reference_batches(documents, seq_len, rows):
    """One token at a time: (token, label, position, document id) for each place in each row."""
    lanes = [(None, 0)] * rows
    while True:
        batch = []
        for lane in range(rows):
            document, position = lanes[lane]
            document_id = 0
            row = []
            for column in range(seq_len):
                if document is None:
                    document, position = next(documents), 0
                    document_id += 1 if column > 0 else 0
                last = position == len(document) - 1
                row.append((document[position], -100 if last else document[position + 1], position, document_id))
                document, position = (None, 0) if last else (document, position + 1)
            lanes[lane] = (document, position)
            batch.append(row)
        yield batch


@settings(deadline=None, max_examples=150)
@given(
    corpus=texts,
    tokenizer=tokenizers,
    seq_len=st.integers(1, 12),
    rows=st.integers(1, 5),
    seed=st.integers(-3, 2**70),
    shuffle=st.booleans(),
)
def test_batches_equal_the_reference(corpus, tokenizer, seq_len, rows, seed, shuffle):
    source = ListSource(corpus, name="here")
    loader = Loader(source, tokenizer, seq_len=seq_len, global_batch_size=rows, seed=seed, shuffle=shuffle)
    documents = reference_documents(corpus, tokenizer, seed, shuffle)
    for expected in islice(reference_batches(documents, seq_len, rows), 10):
        batch = next(loader)
        keys = ("tokens", "labels", "positions", "document_ids")
        assert all(batch[key].dtype == torch.int64 and batch[key].shape == (rows, seq_len) for key in keys)
        assert torch.stack([batch[key] for key in keys], dim=-1).tolist() == [[list(t) for t in r] for r in expected]
        assert batch["sources"] == ["here"] * rows


@settings(deadline=None, max_examples=60)
@given(
    corpus=st.sets(st.text(min_size=1, max_size=25), min_size=1, max_size=8),
    seq_len=st.integers(1, 12),
    rows=st.integers(1, 5),
    steps=st.integers(1, 30),
    shuffle=st.booleans(),
)
def test_every_token_once_per_epoch(corpus, seq_len, rows, steps, shuffle):
    tokenizer = ByteTokenizer()
    corpus = sorted(corpus)
    loader = Loader(ListSource(corpus), tokenizer, seq_len=seq_len, global_batch_size=rows, shuffle=shuffle)
    tokens = torch.cat([next(loader)["tokens"] for _ in range(steps)], dim=1)
    state = loader.state_dict()
    used = Counter()
    for lane, held in zip(tokens.tolist(), state["lanes"], strict=True):
        documents = cut_at_bos(lane)
        if held is not None:
            # Of the document under way, exactly the tokens before the offset have been used.
            epoch, place, offset = held
            text = corpus[order(len(corpus), epoch, shuffle)[place]]
            assert documents.pop() == [256, *text.encode(), 257][:offset]
            used[text] += 1
        for document in documents:
            text = tokenizer.decode(document)
            assert document == [256, *text.encode(), 257]
            used[text] += 1
    # Every epoch that is over counts each document once; the one under way its first `place` documents.
    epoch, place = state["queue"]
    expected = Counter(corpus * epoch)
    expected.update(corpus[i] for i in list(order(len(corpus), epoch, shuffle))[:place])
    assert used == expected


def cut_at_bos(ids):
    """Cut a lane's tokens into documents."""
    documents = []
    for token in ids:
        if token == 256:
            documents.append([])
        documents[-1].append(token)
    return documents


def test_one_whole_epoch_by_hand():
    # Without special tokens and with rows that end where the epoch does, one step is the corpus, each byte once.
    corpus = ["abcd", "e", "", "fgh"]
    loader = Loader(ListSource(corpus), PlainTokenizer(None, None), seq_len=4, global_batch_size=2, shuffle=False)
    batch = next(loader)
    assert [bytes(row) for row in batch["tokens"].tolist()] == [b"abcd", b"efgh"]
    assert batch["labels"].tolist() == [[98, 99, 100, -100], [-100, 103, 104, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert loader.epoch == 1
    assert loader.state_dict()["lanes"] == [None, None]


def test_a_label_looks_into_the_next_row():
    source = ListSource(["abcdef"])
    loader = Loader(source, PlainTokenizer(None, None), seq_len=3, global_batch_size=1)
    assert next(loader)["labels"].tolist() == [[98, 99, 100]]
    batch = next(loader)
    assert batch["labels"].tolist() == [[101, 102, -100]]
    assert batch["positions"].tolist() == [[3, 4, 5]]


def test_epochs_have_orders_of_their_own():
    corpus = [chr(65 + i) for i in range(20)]
    loader = Loader(ListSource(corpus), PlainTokenizer(None, None), seq_len=20, global_batch_size=1)
    epochs = [bytes(next(loader)["tokens"][0].tolist()).decode() for _ in range(4)]
    assert all(sorted(epoch) == corpus for epoch in epochs)
    assert len({*epochs, "".join(corpus)}) == 5


def test_ids_outside_of_the_vocabulary_are_refused():
    class Wrong(ByteTokenizer):
        vocab_size = 257

    with pytest.raises(DataError, match="from 97 to 257, but its vocab_size is 257"):
        next(Loader(ListSource(["a"]), Wrong(), seq_len=4, global_batch_size=1))
