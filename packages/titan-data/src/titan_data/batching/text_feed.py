"""Feeds of text sources: read texts in the order of the queue, tokenize them in blocks.

`RandomAccessFeed` reads shuffled documents by index, `StreamFeed` one document of each shard in turn. `TextFeed` holds
what they share: gathering texts into blocks, and tokenizing blocks ahead in a pool of threads.
"""

import operator
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future

import numpy as np

from titan_data.batching.documents import Block, Cursor, Encode
from titan_data.batching.shuffle import EpochOrder
from titan_data.errors import DataError, is_failure
from titan_data.sources.base import RandomAccessSource, StreamSource

_BLOCK_TEXTS = 16  # texts per block: they are tokenized in one call …
_BLOCK_CHARACTERS = 1 << 18  # … or fewer where they are long
_INDICES = 256  # document numbers of the shuffle computed in one call


class TextFeed(ABC):
    """A queue of texts, tokenized in blocks; with a pool, several blocks ahead and in order.

    Args:
        name: The source's name.
        identity: What the order depends on; see `identity_of`.
        start: The cursor before the first document.
        encode: Turns texts into ids.
        pool: Threads that tokenize ahead, or None to tokenize in `read`.
        blocks_ahead: Number of blocks in the pool.
    """

    def __init__(
        self, name: str, identity: str, start: Cursor, encode: Encode, pool: Executor | None, blocks_ahead: int
    ) -> None:
        self.name = name
        self.identity = identity
        self.start = start
        self._encode = encode
        self._pool = pool
        self._blocks_ahead = blocks_ahead
        self._ahead: deque[Future[Block]] = deque()
        self._at: Cursor | None = None  # where the next block begins; None after an error: `read` has to seek

    @abstractmethod
    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Validate a saved cursor; see `Feed.check`."""

    @abstractmethod
    def _seek(self, cursor: Cursor) -> None:
        """Continue at a cursor."""

    @abstractmethod
    def _take(self) -> tuple[str | None, Cursor]:
        """Read the next text, and the cursor after it; None for the text if the epoch has ended.

        If reading fails the cursor stays, and the call may be repeated.
        """

    def read(self, cursor: Cursor) -> Block:
        """Read and tokenize the next documents."""
        try:
            if cursor != self._at:
                self._drop_ahead()
                self._seek(cursor)
                self._next = cursor
            block = self._tokenize(*self._gather()) if self._pool is None else self._read_ahead(self._pool)
        except BaseException:
            self._at = None
            raise
        self._at = block.next_cursor
        return block

    def _find_failing(self, texts: list[str]) -> int:
        """Return the number of the text that cannot be tokenized by itself."""
        for number, text in enumerate(texts):
            try:
                self._encode([text])
            except BaseException as error:
                if not is_failure(error):
                    raise
                return number
        return 0  # none alone: it is the first of those that fail together

    def _read_ahead(self, pool: Executor) -> Block:
        while len(self._ahead) < self._blocks_ahead:
            try:
                self._ahead.append(pool.submit(self._tokenize, *self._gather()))
            except Exception as error:
                failed: Future[Block] = Future()
                failed.set_exception(error)  # raised when its turn comes: the blocks before it are valid
                self._ahead.append(failed)
                break
        return self._ahead.popleft().result()

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _gather(self) -> tuple[list[str], list[Cursor], Cursor]:
        """Read the texts of one block.

        Returns:
            The texts, the cursors before each and after the last, and the cursor at which the next block begins.
        """
        texts: list[str] = []
        cursors = [self._next]
        characters = 0
        while len(texts) < _BLOCK_TEXTS and characters < _BLOCK_CHARACTERS:
            try:
                text, after = self._take()
            except Exception:
                if texts:
                    break  # the texts before the error are valid; the next call meets the error again
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

    def _tokenize(self, texts: list[str], cursors: list[Cursor], next_cursor: Cursor) -> Block:
        try:
            documents = self._encode(texts) if texts else []
        except DataError as error:
            raise DataError(f"source {self.name!r}, after cursor {list(cursors[0])}: {error}") from error
        except BaseException as error:  # a panic of a library in Rust is not an Exception
            if isinstance(error, Exception) or not is_failure(error):
                raise
            at = self._find_failing(texts)
            raise DataError(
                f"source {self.name!r}, the document at cursor {list(cursors[at])} cannot be tokenized: {error!r}"
            ) from error
        return Block(
            np.array([len(document) for document in documents], dtype=np.int64),
            cursors=cursors.__getitem__,
            tokens=documents.__getitem__,
            describe=lambda d: f"source {self.name!r}, the document at cursor {list(cursors[d])}",
            next_cursor=next_cursor,
        )


class RandomAccessFeed(TextFeed):
    """The queue of a random-access source, in the order of each epoch."""

    def __init__(
        self, source: RandomAccessSource, order: EpochOrder, encode: Encode, pool: Executor | None, blocks_ahead: int
    ) -> None:
        super().__init__(source.name, order.identity, order.start, encode, pool, blocks_ahead)
        self._source = source
        self._order = order
        self._seek(order.start)

    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Validate a saved cursor; see `Feed.check`."""
        return self._order.check(cursor, lenient=lenient)

    def _seek(self, cursor: Cursor) -> None:
        self._epoch, self._index = cursor
        self._documents: deque[int] = deque()

    def _take(self) -> tuple[str | None, Cursor]:
        if not self._documents:
            self._documents.extend(self._order.documents(self._epoch, self._index, _INDICES).tolist())
        text = self._source[self._documents[0]]
        self._documents.popleft()
        self._epoch, self._index = after = self._order.cursor(self._epoch, self._index + 1)
        return text, after


class StreamFeed(TextFeed):
    """The queue of a stream: one text of each shard in turn. Cursor: `(epoch, next shard, texts read of each …)`."""

    def __init__(
        self, source: StreamSource, identity: str, encode: Encode, pool: Executor | None, blocks_ahead: int
    ) -> None:
        if source.shards < 1:
            raise DataError(f"source {source.name!r} has {source.shards} shards, but needs at least 1")
        super().__init__(
            source.name, identity, (0, 0) + (0,) * operator.index(source.shards), encode, pool, blocks_ahead
        )
        self._source = source
        self._iterators: dict[int, Iterator[str] | None] = {}  # None for a shard that has ended
        self._seek(self.start)

    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Validate a saved cursor; see `Feed.check`. A shard that has become shorter is only noticed in reading."""
        if len(cursor) != len(self.start) or not 0 <= cursor[1] < self._source.shards:
            raise DataError(
                f"source {self.name!r} has {self._source.shards} shards, but the saved cursor is of "
                f"{len(cursor) - 2} shards: give the source another name, so that it starts from the beginning"
            )
        return cursor

    def _seek(self, cursor: Cursor) -> None:
        for iterator in self._iterators.values():
            if (close := getattr(iterator, "close", None)) is not None:
                close()  # generators hold files open
        # Always fresh iterators: a generator that has raised looks like one that has come to its end.
        self._iterators = {}
        self._epoch, self._turn, *self._counts = cursor

    def _take(self) -> tuple[str | None, Cursor]:
        for _ in range(self._source.shards):
            shard = self._turn
            try:
                text = self._next_of(shard)
            except BaseException:
                self._seek(self._cursor())
                raise
            self._turn = (shard + 1) % self._source.shards
            if text is not None:
                self._counts[shard] += 1
                return text, self._cursor()
        if not any(self._counts):
            raise DataError(f"source {self.name!r} has no documents")
        self._seek((self._epoch + 1, *self.start[1:]))
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
