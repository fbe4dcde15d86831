"""Packers that cut a queue in its own order: `Concat` every S tokens, `OnePerSequence` at each document.

`QueueReader` is what they, and `best_fit`, read tokens and documents through.
"""

from bisect import bisect_left, bisect_right

from titan_data.batching.documents import Block, Cursor
from titan_data.batching.feeds import Feed
from titan_data.batching.packing import PackedSequence, PackerState, Piece
from titan_data.errors import DataError


class QueueReader:
    """Reads a feed's queue token by token, forward only, until `max_epochs` epochs are used up.

    It keeps the position within the current block as a count of tokens, and finds documents by bisecting the block's
    cumulative lengths: a sequence of many short documents costs no loop unless its pieces are asked for.
    """

    def __init__(self, feed: Feed, max_epochs: int | None) -> None:
        self._feed = feed
        self._max_epochs = max_epochs
        self.seek(feed.start, 0)

    def seek(self, cursor: Cursor, offset: int, *, lenient: bool = False) -> None:
        """Continue `offset` tokens after a cursor; nothing is read yet."""
        self._block: Block | None = None
        self._cursor = cursor  # where the block begins, or the one to be read
        self._boundary = cursor  # right after the last document used, as long as that is not in the block
        self._offset = offset
        self._lenient = lenient
        self._used_tokens = 0  # of the block
        self._k = 0  # the current document: the one after the used tokens
        self._uncounted = 0  # documents without tokens in earlier blocks that are not counted yet

    @property
    def block(self) -> Block:
        """The current document's block; only after `ready`."""
        assert self._block is not None
        return self._block

    @property
    def k(self) -> int:
        """The current document's number in its block."""
        return self._k

    @property
    def used(self) -> int:
        """Tokens already used of the current document; only after `ready`."""
        return self._used_tokens - (self.block.ends[self._k] - self.block.lengths[self._k])

    def cursor_and_offset(self) -> tuple[Cursor, int]:
        """Return the cursor and offset of the next token. They do not depend on how the queue was cut into blocks."""
        if self._block is None:
            return self._boundary, self._offset
        if self._k < len(self._block) and (used := self.used) > 0:
            return self._block.cursor_before(self._k), used
        return (self._block.cursor_after(self._k - 1) if self._k > 0 else self._boundary), 0

    def ready(self) -> bool:
        """Read blocks until there is a current document; return False if all epochs are used up."""
        first_epoch = self._cursor[0]
        while self._block is None or self._k == len(self._block):
            if self._block is not None:
                self._leave(self._block)
            if self._max_epochs is not None and self._cursor[0] >= self._max_epochs:
                return False
            # Two epochs further, the one in between was seen from its first document to its last.
            if self._cursor[0] >= first_epoch + 2:
                raise DataError(f"{self._feed.name!r} has no tokens in a full epoch: all its documents are empty")
            self._block = self._feed.read(self._cursor)
            if self._offset > 0:
                self._enter(self._block)
        return True

    def take(self, count: int, sequence: PackedSequence, *, with_pieces: bool) -> None:
        """Move up to `count` tokens of the current block into a sequence; only after `ready`."""
        block, k, begin = self.block, self._k, self._used_tokens
        end = min(begin + count, block.total)
        last = bisect_left(block.ends, end)  # the document of the last token
        self._count_empty(block, last, sequence)
        if with_pieces:
            for number in range(k, last + 1):
                length = block.lengths[number]
                first = block.ends[number] - length
                stop = min(end - first, length)
                sequence.pieces.append(Piece(block, number, max(begin - first, 0), stop, stop < length))
        self._used_tokens = end
        self._k = bisect_right(block.ends, end, lo=k)
        sequence.tokens += end - begin
        sequence.documents += self._k - k

    def skip_document(self, sequence: PackedSequence) -> int:
        """Skip the rest of the current document and return its number of tokens; only after `ready`."""
        block = self.block
        self._count_empty(block, self._k, sequence)
        left = block.ends[self._k] - self._used_tokens
        self._used_tokens = block.ends[self._k]
        self._k += 1
        return left

    def count_trailing_empty(self) -> int:
        """Return the number of documents without tokens after the last document, once all epochs are used up."""
        # The state moves past them only now: a resume from before skips and counts them again.
        self._boundary = self._cursor
        count, self._uncounted = self._uncounted, 0
        return count

    def _count_empty(self, block: Block, last: int, sequence: PackedSequence) -> None:
        # Counted when the next document with tokens begins: that does not depend on how the queue is cut into blocks.
        sequence.skipped += self._uncounted + block.empty_before[last]
        self._uncounted = -block.empty_before[last]

    def _leave(self, block: Block) -> None:
        if len(block) > 0:
            self._boundary = block.cursor_after(len(block) - 1)
        self._uncounted += block.empty_before[-1]
        self._cursor = block.next_cursor
        self._block, self._used_tokens, self._k = None, 0, 0

    def _enter(self, block: Block) -> None:
        """Continue inside the first document of a block, after a seek with an offset."""
        offset, self._offset = self._offset, 0
        starts_with_tokens = len(block) > 0 and block.empty_before[0] == 0
        if starts_with_tokens and offset < block.lengths[0]:
            self._used_tokens = offset
        elif not self._lenient:
            raise DataError(
                f"{self._feed.name!r}: the saved state is {offset} tokens into the document at {list(self._cursor)}, "
                f"which has {block.lengths[0] if starts_with_tokens else 0} tokens: the data have changed"
            )
        elif starts_with_tokens:
            self._used_tokens, self._k = block.lengths[0], 1


class Concat:
    """Concatenate documents and cut every S tokens."""

    def __init__(self, feed: Feed, max_epochs: int | None) -> None:
        self._queue = QueueReader(feed, max_epochs)

    def state(self) -> PackerState:
        """Return where the next sequence begins."""
        return PackerState(*self._queue.cursor_and_offset())

    def seek(self, state: PackerState, *, lenient: bool = False) -> None:
        """Continue from a state."""
        self._queue.seek(state.cursor, state.offset, lenient=lenient)

    def next_sequence(self, seq_len: int, *, with_pieces: bool) -> PackedSequence:
        """Cut the next sequence; only the last one before the end of the epochs has fewer than S tokens."""
        sequence = PackedSequence()
        while sequence.tokens < seq_len:
            if not self._queue.ready():
                sequence.skipped += self._queue.count_trailing_empty()
                break
            self._queue.take(seq_len - sequence.tokens, sequence, with_pieces=with_pieces)
        return sequence


class OnePerSequence:
    """Give each document its own sequences."""

    def __init__(self, feed: Feed, max_epochs: int | None, *, crop: bool) -> None:
        self._queue = QueueReader(feed, max_epochs)
        self._crop = crop

    def state(self) -> PackerState:
        """Return where the next sequence begins."""
        return PackerState(*self._queue.cursor_and_offset())

    def seek(self, state: PackerState, *, lenient: bool = False) -> None:
        """Continue from a state."""
        self._queue.seek(state.cursor, state.offset, lenient=lenient)

    def next_sequence(self, seq_len: int, *, with_pieces: bool) -> PackedSequence:
        """Cut the next sequence: the next document, or the next S tokens of a longer one."""
        sequence, queue = PackedSequence(), self._queue
        if not queue.ready():
            sequence.skipped += queue.count_trailing_empty()
            return sequence
        left = queue.block.lengths[queue.k] - queue.used
        queue.take(min(seq_len, left), sequence, with_pieces=with_pieces)
        if self._crop and left > seq_len:
            sequence.cropped = queue.skip_document(sequence)
            sequence.documents += 1
            sequence.pieces = [piece._replace(continues=False) for piece in sequence.pieces]
        return sequence
