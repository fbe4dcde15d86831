"""best_fit with a sequence length that changes: a document's neighboring tokens stay one document in a sequence."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_flat import flat_loader
from titan_data import Fingerprint, MixtureSource, Packing, Phase


class Documents:
    """Token documents whose ids say where each token belongs."""

    name, tokenizer_fingerprint = "documents", None

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths)
        self._starts = np.cumsum([0, *lengths])

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of("documents", [("lengths", str(self._lengths.tolist()))])

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, indices: Any) -> Any:
        return self._lengths[indices]

    def __getitem__(self, index: int) -> Any:
        return np.arange(self._starts[index], self._starts[index + 1])


def rows(lengths: list[int], phases: list[Phase], seq_len: int, crop: bool) -> list[tuple[list[int], list[int]]]:
    packing = Packing("best_fit", packing_window=4, long_documents="crop" if crop else "split")
    loader = flat_loader(
        [MixtureSource(Documents(lengths), max_epochs=1)],
        None,
        seq_len=seq_len,
        global_batch_size=1,
        packing=packing,
        phases=phases,
        prefetch=0,
    )
    found = []
    for batch in loader:
        tokens, numbers = batch["tokens"][0].tolist(), batch["document_ids"][0].tolist()
        used = int(np.sum(batch["labels"][0].numpy() != -100)) + len(set(numbers))  # at most: padding is one more
        found.append((tokens[:used], numbers[:used]))
    return found


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5),
    step=st.integers(1, 3),
)
def test_a_document_is_never_two_in_one_sequence(lengths: list[int], sizes: list[int], step: int) -> None:
    phases = [Phase(1 + i * step, seq_len=size) for i, size in enumerate(sizes[1:])]
    starts = {int(start) for start in np.cumsum([0, *lengths])}
    seen: list[int] = []
    for tokens, numbers in rows(lengths, phases, sizes[0], crop=False):
        pairs = zip(tokens, tokens[1:], numbers, numbers[1:], strict=False)
        for token, following, number, next_number in pairs:
            if following == token + 1 and following not in starts:
                assert number == next_number, (tokens, numbers)
        seen += tokens
    assert {*range(sum(lengths))} <= {*seen}


def test_the_longer_sequence_is_used() -> None:
    _, (tokens, numbers), *_ = rows([96], [Phase(1, seq_len=64)], 32, crop=False)
    assert len(tokens) == 64
    assert set(numbers) == {0}


@pytest.mark.parametrize(("before", "after"), [(32, 64), (64, 32)])
def test_what_is_cropped_is_decided_by_the_length_in_use(before: int, after: int) -> None:
    found = rows([96] * 4, [Phase(1, seq_len=after)], before, crop=True)
    assert [len(tokens) for tokens, _ in found] == [before, after, after, after]
