"""Feeds: a source's queue of documents (all of epoch 0, then all of epoch 1, and so on), read in blocks.

`open_feed` is called by `Loader` for each source; packers read the feed's blocks.
"""

from concurrent.futures import Executor
from typing import Protocol

import numpy as np

from titan_data.batching.documents import Block, Cursor, Encode
from titan_data.batching.shuffle import EpochOrder
from titan_data.batching.text_feed import RandomAccessFeed, StreamFeed
from titan_data.errors import DataError
from titan_data.sources.base import RandomAccessSource, Source, TokenSource

_BLOCK_DOCUMENTS = 1024  # documents per block: their lengths are looked up in one call
_BLOCKS_AHEAD = 2  # blocks tokenized ahead per worker


class Feed(Protocol):
    """Reads a source's queue from any cursor on."""

    @property
    def name(self) -> str:
        """The source's name, for messages."""
        ...

    @property
    def identity(self) -> str:
        """What orders of the source's documents, and of their sequences, depend on; see `identity_of`."""
        ...

    @property
    def start(self) -> Cursor:
        """The cursor before the first document."""
        ...

    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Validate a saved cursor.

        Args:
            cursor: The saved cursor.
            lenient: Whether the documents may have changed since it was saved: a cursor beyond the last document then
                means the end of the epoch.

        Returns:
            The cursor to continue at.

        Raises:
            DataError: If the queue has no such cursor.
        """
        ...

    def read(self, cursor: Cursor) -> Block:
        """Read a block of documents, at most to the end of the epoch. Cheapest where the previous block ended.

        Raises:
            DataError: If the source has no documents. Errors of the source pass through; the call may be repeated.
        """
        ...


def open_feed(
    source: Source,
    identity: str,
    encode: Encode | None,
    *,
    seed: int,
    shuffle: bool,
    pool: Executor | None,
    workers: int,
) -> Feed:
    """Open the feed for a source.

    Args:
        source: Where the documents come from.
        identity: What the order depends on besides seed and epoch; see `identity_of`.
        encode: Turns texts into ids; may be None for a source of tokens.
        seed: Seed of the shuffle.
        shuffle: Whether to shuffle; no effect on a stream, which is read in its own order.
        pool: Threads that tokenize ahead, or None to tokenize when the tokens are needed.
        workers: Number of threads in the pool.

    Returns:
        The feed.

    Raises:
        DataError: If the source has no documents, or is text and there is no tokenizer.
    """
    # TokenSource first: it has all members of RandomAccessSource, and more.
    if isinstance(source, TokenSource):
        return TokenFeed(source, EpochOrder(source.name, identity, len(source), seed=seed, shuffle=shuffle))
    if encode is None:
        raise DataError(f"source {source.name!r} contains text, so the loader needs a tokenizer")
    blocks_ahead = workers * _BLOCKS_AHEAD
    if isinstance(source, RandomAccessSource):
        order = EpochOrder(source.name, identity, len(source), seed=seed, shuffle=shuffle)
        return RandomAccessFeed(source, order, encode, pool, blocks_ahead)
    return StreamFeed(source, identity, encode, pool, blocks_ahead)


class TokenFeed:
    """The queue of a token source. Only lengths are read; tokens are read when a sequence is built."""

    def __init__(self, source: TokenSource, order: EpochOrder) -> None:
        self._source = source
        self._order = order
        self.name = source.name
        self.identity = order.identity
        self.start = order.start
        self.check = order.check

    def read(self, cursor: Cursor) -> Block:
        """Look up the lengths of the next documents."""
        epoch, index = cursor
        documents = self._order.documents(epoch, index, _BLOCK_DOCUMENTS)
        lengths = np.asarray(self._source.lengths(documents), dtype=np.int64)
        if lengths.shape != documents.shape or int(lengths.min()) < 0:
            raise DataError(f"source {self._source.name!r}: lengths() must return one non-negative length per document")
        return Block(
            lengths,
            cursors=lambda d: self._order.cursor(epoch, index + d),
            tokens=lambda d: self._source[int(documents[d])],
            describe=lambda d: f"source {self._source.name!r}, document {documents[d]}",
            next_cursor=self._order.cursor(epoch, index + len(documents)),
        )
