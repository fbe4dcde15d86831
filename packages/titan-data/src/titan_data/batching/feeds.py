"""A source's documents in the order of its queue: all of epoch 0, then all of epoch 1, and so on without end."""

from concurrent.futures import Executor
from typing import Protocol

import numpy as np

from titan_data.batching.documents import Block, Cursor, Encode
from titan_data.batching.shuffle import Order
from titan_data.batching.text_feed import RandomAccessTexts, StreamTexts, TextFeed, Texts
from titan_data.errors import DataError
from titan_data.sources.base import RandomAccessSource, Source, TokenSource

_BLOCK_DOCUMENTS = 1024  # whose lengths are looked up at once
_BLOCKS_AHEAD = 2  # per worker


class Feed(Protocol):
    """Reads a source's queue from any place of it."""

    @property
    def name(self) -> str:
        """The source's name, for messages."""
        ...

    @property
    def start(self) -> Cursor:
        """The place before the first document."""
        ...

    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Make sure that the queue has a place.

        Args:
            cursor: the place, as it was saved.
            lenient: whether the documents may be others than when it was saved: a place beyond the last document is
                then the end of the epoch.

        Returns:
            The place.

        Raises:
            DataError: there is no such place.
        """
        ...

    def read(self, cursor: Cursor) -> Block:
        """Read some documents, no more than to the end of the epoch. Cheapest where the block before ended.

        Raises:
            DataError: the source has no documents. Other errors of the source pass through. Reading may be tried again.
        """
        ...


def open_feed(
    source: Source, encode: Encode | None, *, seed: int, shuffle: bool, pool: Executor | None, workers: int
) -> Feed:
    """Make the feed that suits a source.

    Args:
        source: where the documents come from.
        encode: turns texts into ids; may be None for a source of tokens.
        seed: together with the source's name and the epoch, decides the order where documents are shuffled.
        shuffle: whether to shuffle; of no effect on a stream, which has only its own order.
        pool: threads that tokenize ahead, or None to tokenize when the tokens are asked for.
        workers: number of threads in the pool.

    Returns:
        The feed.

    Raises:
        DataError: the source has no documents, or a tokenizer is missing.
    """
    # A TokenSource has all that a RandomAccessSource has, and more: so it comes first.
    if isinstance(source, TokenSource):
        return TokenFeed(source, Order(source.name, len(source), seed=seed, shuffle=shuffle))
    texts: Texts
    if isinstance(source, RandomAccessSource):
        texts = RandomAccessTexts(source, Order(source.name, len(source), seed=seed, shuffle=shuffle))
    else:
        texts = StreamTexts(source)
    if encode is None:
        raise DataError(f"source {source.name!r} gives text, so the loader needs a tokenizer")
    return TextFeed(texts, encode, pool, workers * _BLOCKS_AHEAD)


class TokenFeed:
    """The queue of a source of tokens: only lengths are read until somebody wants the tokens themselves."""

    def __init__(self, source: TokenSource, order: Order) -> None:
        self._source = source
        self._order = order
        self.name = source.name
        self.start = order.start
        self.check = order.check

    def read(self, cursor: Cursor) -> Block:
        """Look up the lengths of some documents."""
        epoch, place = cursor
        indices = self._order.indices(epoch, place, _BLOCK_DOCUMENTS)
        lengths = np.asarray(self._source.lengths(indices), dtype=np.int64)
        if lengths.shape != indices.shape or int(lengths.min()) < 0:
            raise DataError(f"source {self._source.name!r}: lengths() must give one length, not negative, per document")
        return Block(
            lengths,
            cursors=lambda d: self._order.cursor(epoch, place + d),
            tokens=lambda d: self._source[int(indices[d])],
            describe=lambda d: f"source {self._source.name!r}, document {indices[d]}",
            after=self._order.cursor(epoch, place + len(indices)),
        )
