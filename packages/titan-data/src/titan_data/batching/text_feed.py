"""The queue of a source of texts: read in order, tokenized in blocks."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Protocol

import numpy as np

from titan_data.batching.documents import Block, Cursor, Encode
from titan_data.batching.shuffle import Order
from titan_data.errors import DataError
from titan_data.sources.base import RandomAccessSource, StreamSource

_BLOCK_TEXTS = 16  # that are tokenized at once …
_BLOCK_CHARACTERS = 1 << 18  # … or fewer where they are long


class Texts(Protocol):
    """Texts one by one in the order of the queue."""

    name: str
    start: Cursor

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

    def seek(self, cursor: Cursor) -> None:
        """Go to a place."""
        ...

    def take(self) -> tuple[str | None, Cursor]:
        """Give the next text and the place after it; None for the text where the epoch has ended.

        Where reading fails, the place stays, and taking may be tried again.
        """
        ...


class RandomAccessTexts:
    """The texts of a random-access source."""

    _CHUNK = 256  # places whose documents are computed at once

    def __init__(self, source: RandomAccessSource, order: Order) -> None:
        self._source = source
        self._order = order
        self.name = source.name
        self.start = order.start
        self.check = order.check
        self.seek(order.start)

    def seek(self, cursor: Cursor) -> None:
        """Go to a place."""
        self._epoch, self._place = cursor
        self._indices: deque[int] = deque()

    def take(self) -> tuple[str | None, Cursor]:
        """Read the next text."""
        if not self._indices:
            self._indices.extend(self._order.indices(self._epoch, self._place, self._CHUNK).tolist())
        text = self._source[self._indices[0]]
        self._indices.popleft()
        self._epoch, self._place = after = self._order.cursor(self._epoch, self._place + 1)
        return text, after


class StreamTexts:
    """The texts of a stream: one of each shard in turn. A cursor is `(epoch, next shard, texts taken of each …)`."""

    def __init__(self, source: StreamSource) -> None:
        if source.shards < 1:
            raise DataError(f"source {source.name!r} has {source.shards} shards, but needs at least 1")
        self._source = source
        self.name = source.name
        self.start: Cursor = (0, 0) + (0,) * source.shards
        self._iterators: dict[int, Iterator[str] | None] = {}  # None for a shard that has ended
        self.seek(self.start)

    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Return the place if there is one, as `Feed.check` says; that a shard has become shorter shows in reading."""
        if len(cursor) != len(self.start) or not 0 <= cursor[1] < self._source.shards:
            raise DataError(
                f"source {self.name!r} has {self._source.shards} shards, but the saved place is one in "
                f"{len(cursor) - 2}: give the source another name, so that it begins anew"
            )
        return cursor

    def seek(self, cursor: Cursor) -> None:
        """Go to a place; the shards are opened when their turn comes."""
        for iterator in self._iterators.values():
            if (close := getattr(iterator, "close", None)) is not None:
                close()  # generators hold files open
        # Always fresh iterators: a generator that has raised looks like one that has come to its end.
        self._iterators = {}
        self._epoch, self._turn, *self._counts = cursor

    def take(self) -> tuple[str | None, Cursor]:
        """Read the next text."""
        for _ in range(self._source.shards):
            shard = self._turn
            try:
                text = self._next_of(shard)
            except BaseException:
                self.seek(self._cursor())
                raise
            self._turn = (shard + 1) % self._source.shards
            if text is not None:
                self._counts[shard] += 1
                return text, self._cursor()
        if not any(self._counts):
            raise DataError(f"source {self.name!r} has no documents")
        self.seek((self._epoch + 1, *self.start[1:]))
        return None, self._cursor()

    def _next_of(self, shard: int) -> str | None:
        if shard not in self._iterators:
            self._iterators[shard] = self._source.iterate(shard, self._counts[shard])
        iterator = self._iterators[shard]
        text = None if iterator is None else next(iterator, None)
        if text is None:
            self._iterators[shard] = None
        return text

    def _cursor(self) -> Cursor:
        return (self._epoch, self._turn, *self._counts)


class TextFeed:
    """The queue of a source of texts, tokenized in blocks; with a pool, some blocks ahead and in their order."""

    def __init__(self, texts: Texts, encode: Encode, pool: Executor | None, blocks_ahead: int) -> None:
        self._texts = texts
        self._encode = encode
        self._pool = pool
        self._blocks_ahead = blocks_ahead
        self._ahead: deque[Future[Block]] = deque()
        self._at: Cursor | None = None  # where the next block begins; None where that is to be sought
        self.name = texts.name
        self.start = texts.start
        self.check = texts.check

    def read(self, cursor: Cursor) -> Block:
        """Read and tokenize some documents."""
        try:
            if cursor != self._at:
                self._drop_ahead()
                self._texts.seek(cursor)
                self._next = cursor
            block = self._tokenize(*self._gather()) if self._pool is None else self._read_ahead(self._pool)
        except BaseException:
            self._at = None
            raise
        self._at = block.after
        return block

    def _read_ahead(self, pool: Executor) -> Block:
        while len(self._ahead) < self._blocks_ahead:
            try:
                self._ahead.append(pool.submit(self._tokenize, *self._gather()))
            except Exception as error:
                failed: Future[Block] = Future()
                failed.set_exception(error)  # for the one who comes to it: what lies before it is good
                self._ahead.append(failed)
                break
        return self._ahead.popleft().result()

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _gather(self) -> tuple[list[str], list[Cursor], Cursor]:
        """Read texts for one block, the places before each and after the last, and where the next block begins."""
        texts: list[str] = []
        cursors = [self._next]
        characters = 0
        while len(texts) < _BLOCK_TEXTS and characters < _BLOCK_CHARACTERS:
            try:
                text, after = self._texts.take()
            except Exception:
                if texts:
                    break  # what was read is good; whoever comes to the bad place is told
                raise
            if text is not None:
                texts.append(text)
                cursors.append(after)
                characters += len(text)
            ended = after[0] != self._next[0]
            self._next = after
            if ended:
                break
        return texts, cursors, self._next

    def _tokenize(self, texts: list[str], cursors: list[Cursor], after: Cursor) -> Block:
        try:
            documents = self._encode(texts) if texts else []
        except DataError as error:
            raise DataError(f"source {self.name!r}, after place {list(cursors[0])}: {error}") from error
        return Block(
            np.array([len(document) for document in documents], dtype=np.int64),
            cursors=cursors.__getitem__,
            tokens=documents.__getitem__,
            describe=lambda d: f"source {self.name!r}, the document at place {list(cursors[d])}",
            after=after,
        )
