"""What is in a batch, held against slow references that go token by token."""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_flat import flat_loader
from data_loader_cases import KEYS, ListTokens, encoded, numbered
from titan_data import ByteTokenizer, DataError, ListSource, Loader, MixtureSource, Packing, Permutation
from titan_data.batching.best_fit import best_fit

lengths = st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any)
sizes = {"seq_len": st.integers(1, 12), "rows": st.integers(1, 5)}
kinds = st.sampled_from(("concat", "best_fit", "one_per_row"))


class PlainTokenizer(ByteTokenizer):
    """Bytes with the special tokens of choice."""

    fingerprint = "plain"

    def __init__(self, bos_id: int | None, eos_id: int | None) -> None:
        self.bos_id = bos_id
        self.eos_id = eos_id


tokenizers = st.sampled_from([ByteTokenizer(), *(PlainTokenizer(b, e) for b in (None, 256) for e in (None, 257))])


def read_all(
    documents: list[Any], seq_len: int, rows: int, packing: Packing, epochs: int = 1, **options: Any
) -> tuple[dict[str, Any], list[str], Loader]:
    """Read all epochs of a source of tokens: the concatenated batches, `[rows, S]` for each key, and the loader."""
    loader = flat_loader(
        [MixtureSource(ListTokens(documents), max_epochs=epochs)],
        None,
        seq_len=seq_len,
        global_batch_size=rows,
        packing=packing,
        prefetch=0,
        **options,
    )
    batches = list(loader)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in KEYS}
    return whole, [name for batch in batches for name in batch["sources"]], loader


def reference_stream(
    corpus: list[str], tokenizer: PlainTokenizer | ByteTokenizer, seed: int, shuffle: bool, name: str
) -> Iterator[tuple[int, int, bool]]:
    """Token after token of the endless queue: (token, label, first of its document)."""
    for epoch in count():
        order = Permutation(len(corpus), f"{seed}/{name}/{epoch}") if shuffle else range(len(corpus))
        for index in order:
            if corpus[index]:
                ids = [tokenizer.bos_id, *corpus[index].encode(), tokenizer.eos_id]
                ids = [token for token in ids if token is not None]
                yield from zip(ids, [*ids[1:], -100], [True] + [False] * (len(ids) - 1), strict=True)


@settings(deadline=None, max_examples=100)
@given(
    corpus=st.lists(st.text(max_size=25), min_size=1, max_size=8).filter(any),
    tokenizer=tokenizers,
    seed=st.integers(-3, 2**70),
    shuffle=st.booleans(),
    **sizes,
)
def test_concat_equals_the_reference(
    corpus: list[str], tokenizer: PlainTokenizer | ByteTokenizer, seq_len: int, rows: int, seed: int, shuffle: bool
) -> None:
    source = ListSource(corpus, name="here")
    loader = flat_loader(
        source, tokenizer, seq_len=seq_len, global_batch_size=rows, seed=seed, shuffle=shuffle, prefetch=0
    )
    stream = reference_stream(corpus, tokenizer, seed, shuffle, "here")
    for _ in range(8):
        batch = next(loader)
        assert all(batch[key].dtype == torch.int64 and batch[key].shape == (rows, seq_len) for key in KEYS)
        for row in range(rows):
            expected, document_id, position = [], -1, 0
            for token, label, first in islice(stream, seq_len):
                if first or not expected:
                    document_id, position = document_id + 1, 0
                expected.append((token, label, position, document_id))
                position += 1
            assert list(zip(*(batch[key][row].tolist() for key in KEYS), strict=True)) == expected
        assert batch["sources"] == ["here"] * rows


@settings(deadline=None, max_examples=150)
@given(
    lengths=lengths,
    kind=kinds,
    epochs=st.integers(1, 3),
    packing_window=st.integers(1, 40),
    shuffle=st.booleans(),
    **sizes,
)
def test_every_token_once_per_epoch_and_all_of_it_is_counted(
    lengths: list[int], kind: str, epochs: int, packing_window: int, shuffle: bool, seq_len: int, rows: int
) -> None:
    documents = numbered(lengths)
    packing = Packing(kind, packing_window=packing_window)
    got, sources, loader = read_all(documents, seq_len, rows, packing, epochs, shuffle=shuffle)
    real = got["tokens"] > 0
    total = sum(lengths)
    used = got["tokens"][real].tolist()
    assert len(used) == total * epochs
    for begin in range(0, len(used), total):  # an epoch is over before the next one begins
        assert sorted(used[begin : begin + total]) == list(range(1, total + 1))
    assert_labels(got, real, documents)
    padded_rows = sources.count("")
    assert sources == ["tokens"] * (len(sources) - padded_rows) + [""] * padded_rows
    assert padded_rows < rows, "a batch of nothing but padding"
    account = loader.accounting()["tokens"]
    # Empty documents after the very last token are not come to.
    assert lengths.count(0) * (epochs - 1) <= account.pop("skipped") <= lengths.count(0) * epochs
    assert account.pop("epoch") in (epochs - 1, epochs)
    assert account == {
        "tokens": total * epochs,
        "documents": sum(length > 0 for length in lengths) * epochs,
        "padding": int((~real).sum()) - padded_rows * seq_len,
        "cropped": 0,
    }


@settings(deadline=None, max_examples=100)
@given(lengths=lengths, kind=st.sampled_from(("best_fit", "one_per_row")), packing_window=st.integers(1, 40), **sizes)
def test_cropped_documents_keep_their_beginnings(
    lengths: list[int], kind: str, packing_window: int, seq_len: int, rows: int
) -> None:
    documents = numbered(lengths)
    got, _, loader = read_all(documents, seq_len, rows, Packing(kind, "crop", packing_window))
    kept = [document[:seq_len] for document in documents]
    real = got["tokens"] > 0
    assert sorted(got["tokens"][real].tolist()) == [token for document in kept for token in document]
    assert_labels(got, real, kept)
    account = loader.accounting()["tokens"]
    assert account["cropped"] == sum(max(length - seq_len, 0) for length in lengths)
    assert account["documents"] == sum(length > 0 for length in lengths)


def assert_labels(got: Any, real: Any, documents: list[Any]) -> None:
    last = {document[-1] for document in documents if len(document)}
    for tokens, labels, positions, ids, is_real in zip(*(got[key] for key in KEYS), real, strict=True):
        row = list(zip(*(x.tolist() for x in (tokens, labels, positions, ids, is_real)), strict=True))
        for column, (token, label, position, document_id, is_token) in enumerate(row):
            assert label == (token + 1 if is_token and token not in last else -100)
            previous = row[column - 1] if column > 0 else None
            if previous is None:
                assert (position, document_id) == (0, 0)
            elif (position, document_id) != (previous[2] + 1, previous[3]):
                assert (position, document_id) == (0, previous[3] + 1)
                assert previous[0] in last or not is_token or previous[1] == previous[0] + 1
            elif is_token:
                assert token == previous[0] + 1, "one document id over two documents"
    # A document begins with a document id of its own.
    firsts = {document[0] for document in documents if len(document)}
    for token, position in zip(got["tokens"][real].tolist(), got["positions"][real].tolist(), strict=True):
        assert token not in firsts or position == 0


@settings(deadline=None, max_examples=60)
@given(lengths=lengths, kind=kinds, **sizes)
def test_without_boundaries_a_sequence_is_one_text(lengths: list[int], kind: str, seq_len: int, rows: int) -> None:
    documents = numbered(lengths)
    apart, _, _ = read_all(documents, seq_len, rows, Packing(kind))
    got, _, _ = read_all(documents, seq_len, rows, Packing(kind, cross_document=True))
    assert torch.equal(got["tokens"], apart["tokens"])
    real = apart["tokens"] > 0
    for row in range(len(real)):
        size = int(real[row].sum())
        assert got["document_ids"][row].tolist() == [0] * size + [int(size > 0)] * (seq_len - size)
        assert got["positions"][row].tolist() == [*range(size), *range(seq_len - size)]
        labels = got["labels"][row].tolist()
        assert labels[: size - 1] == got["tokens"][row, 1:size].tolist() if size else True
        # The sequence's last token predicts what comes after it in its own document, and nothing else does.
        assert labels[max(size - 1, 0) :] == apart["labels"][row, max(size - 1, 0) :].tolist()


@pytest.mark.parametrize("kind", ["concat", "best_fit", "one_per_row"])
@pytest.mark.parametrize("cross_document", [False, True])
def test_how_many_rows_are_worked_on_at_a_time_changes_nothing(
    kind: str, cross_document: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (numbered([5, 9, 0, 1, 30, 2, 2, 7]), 8, 5, Packing(kind, cross_document=cross_document))
    at_once, _, _ = read_all(*arguments)
    for tokens in (1, 16, 24):
        monkeypatch.setattr("titan_data.batching.batch._CACHED_TOKENS", tokens)
        in_parts, _, _ = read_all(*arguments)
        assert all(torch.equal(in_parts[key], at_once[key]) for key in KEYS)


def test_one_whole_epoch_by_hand() -> None:
    # Without special tokens and with sequences that end where the epoch does, one step is the corpus, each byte once.
    corpus = ["abcd", "e", "", "fgh"]
    loader = flat_loader(ListSource(corpus), PlainTokenizer(None, None), seq_len=4, global_batch_size=2, shuffle=False)
    batch = next(loader)
    assert [bytes(row) for row in batch["tokens"].tolist()] == [b"abcd", b"efgh"]
    assert batch["labels"].tolist() == [[98, 99, 100, -100], [-100, 103, 104, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_a_label_looks_into_the_next_row() -> None:
    loader = flat_loader(ListSource(["abcdef"]), PlainTokenizer(None, None), seq_len=3, global_batch_size=1)
    assert next(loader)["labels"].tolist() == [[98, 99, 100]]
    batch = next(loader)
    assert batch["labels"].tolist() == [[101, 102, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2]]


def test_best_fit_by_hand() -> None:
    documents = numbered([3, 6, 3, 2, 1])
    got, _, loader = read_all(documents, 6, 3, Packing("best_fit"), shuffle=False)
    assert got["tokens"].tolist() == [[1, 2, 3, 10, 11, 12], [4, 5, 6, 7, 8, 9], [13, 14, 15, 0, 0, 0]]
    assert got["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6, [0, 0, 1, 2, 2, 2]]
    assert got["labels"].tolist() == [[2, 3, -100, 11, 12, -100], [5, 6, 7, 8, 9, -100], [14, -100, -100] + [-100] * 3]
    assert loader.accounting()["tokens"]["padding"] == 3


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 40), data=st.data())
def test_best_fit_bins_hold_everything_once_and_leave_no_two_half_empty(size: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, size), max_size=60))
    bins = best_fit(lengths, size)
    assert sorted(number for numbers in bins for number in numbers) == list(range(len(lengths)))
    loads = [sum(lengths[number] for number in numbers) for numbers in bins]
    assert all(0 < load <= size for load in loads)
    assert sum(2 * load <= size for load in loads) <= 1
    assert bins == sorted(bins)


def test_best_fit_looks_at_few_documents_together_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = numbered([9, 4, 30, 2, 2, 2, 40, 1])
    monkeypatch.setattr("titan_data.batching.best_fit._MAX_TOKENS", 20)
    got, _, loader = read_all(documents, 10, 2, Packing("best_fit"), shuffle=False)
    assert sorted(got["tokens"][got["tokens"] > 0].tolist()) == list(range(1, 91))
    # 43 tokens, then 46, then 1: each in as few sequences as possible, and those two that are not full are padded.
    assert loader.accounting()["tokens"]["padding"] == 7 + 4 + 9


def test_best_fit_pads_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (3000,), generator=generator).tolist()
    _, _, loader = read_all([[1] * length for length in lengths], 1024, 8, Packing("best_fit"))
    account = loader.accounting()["tokens"]
    assert account["padding"] < 0.02 * account["tokens"]


def test_padding_is_the_tokenizers() -> None:
    class Padded(ByteTokenizer):
        pad_id = 7

    for tokenizer, pad in ((ByteTokenizer(), 257), (Padded(), 7), (PlainTokenizer(None, None), 0)):
        packing = Packing("one_per_row")
        batch = next(flat_loader(ListSource(["a"]), tokenizer, seq_len=6, global_batch_size=1, packing=packing))
        assert batch["tokens"][0, 4:].tolist() == [pad, pad]


def test_epochs_have_orders_of_their_own() -> None:
    corpus = [chr(65 + i) for i in range(20)]
    loader = flat_loader(ListSource(corpus), PlainTokenizer(None, None), seq_len=20, global_batch_size=1)
    epochs = [bytes(next(loader)["tokens"][0].tolist()).decode() for _ in range(4)]
    assert all(sorted(epoch) == corpus for epoch in epochs)
    assert len({*epochs, "".join(corpus)}) == 5


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    class Wrong(ByteTokenizer):
        vocab_size = 257

    with pytest.raises(DataError, match=r"source 'list'.*from 97 to 257, but its vocab_size is 257"):
        next(flat_loader(ListSource(["a"]), Wrong(), seq_len=4, global_batch_size=1))

    class Huge(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[2**70] for _ in texts]

    with pytest.raises(DataError, match=f"{2**70}, which does not fit into 64 bits"):
        next(flat_loader(ListSource(["a"]), Huge(), seq_len=4, global_batch_size=1))


def test_ready_made_ids_outside_of_the_vocabulary_name_their_document() -> None:
    documents = [*encoded(["abc", "de"]), [5, 300, 6]]
    loader = flat_loader(ListTokens(documents), ByteTokenizer(), seq_len=4, global_batch_size=3, shuffle=False)
    with pytest.raises(DataError, match=r"source 'tokens', document 2, token 1 has id 300, .* vocabulary of 258"):
        next(loader)
    negative = ListTokens([[1, -5]], dtype="int32")
    with pytest.raises(DataError, match="document 0, token 1 has id -5, negative"):
        next(flat_loader(negative, None, seq_len=2, global_batch_size=1))


def test_settings_that_cannot_be() -> None:
    for bad in ({"kind": "best"}, {"long_documents": "drop"}, {"long_documents": "crop"}, {"packing_window": 0}):
        with pytest.raises(DataError, match=f"{bad.get('kind', next(iter(bad)))}|concat"):
            Packing(**bad)
