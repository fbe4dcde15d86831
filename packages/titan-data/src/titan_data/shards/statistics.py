"""Statistics of the lengths of a token source's documents. Used by `titan-data inspect` and `prepare`."""

from dataclasses import dataclass

import numpy as np

from titan_data.sources.base import TokenSource

_CHUNK = 1 << 20  # documents per call of `lengths`


@dataclass(frozen=True)
class LengthStatistics:
    """Statistics of the lengths of all documents.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens.
        empty: Number of documents without tokens.
        shortest: Tokens of the shortest document that is not empty; 0 if all are empty.
        longest: Tokens of the longest document.
        counts: Entry k is the number of documents of `2**k` to `2**(k + 1) - 1` tokens, up to the longest.
    """

    documents: int
    tokens: int
    empty: int
    shortest: int
    longest: int
    counts: tuple[int, ...]


def count_lengths(source: TokenSource) -> LengthStatistics:
    """Compute statistics of all documents' lengths, without reading their tokens."""
    counts = np.zeros(64, dtype=np.int64)
    tokens = empty = longest = 0
    shortest: int | None = None
    for start in range(0, len(source), _CHUNK):
        lengths = source.lengths(np.arange(start, min(start + _CHUNK, len(source))))
        tokens += int(lengths.sum())
        lengths = lengths[lengths > 0]
        empty += min(_CHUNK, len(source) - start) - len(lengths)
        if len(lengths):
            shortest = min(int(lengths.min()), shortest or int(lengths.min()))
            longest = max(int(lengths.max()), longest)
            counts += np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1, minlength=64)
    bins = counts[: longest.bit_length()]
    return LengthStatistics(len(source), tokens, empty, shortest or 0, longest, tuple(int(count) for count in bins))
