"""From documents to rows: a packer cuts one source's queue into rows, and can say where the next one begins.

Whoever wants a row also says whether its pieces are wanted: a rank walks over the rows of others by lengths alone.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from titan_data.batching.documents import Block, Cursor
from titan_data.batching.feeds import Feed
from titan_data.errors import DataError


@dataclass(frozen=True)
class Packing:
    """How documents become rows of S tokens.

    Attributes:
        kind: "concat" lays the documents end to end and cuts every S tokens: no padding. "best_fit" looks at some
            documents at once and lays whole ones into rows, each where it leaves the least room: next to no cut
            documents, a little padding. "one_per_row" gives each document rows of its own.
        long_documents: what becomes of documents longer than a row, for the last two kinds: "split" them over several
            rows or "crop" them to the first S tokens (which are counted).
        look_ahead: how many documents "best_fit" looks at together. More of them leave less padding, and spread a long
            document's rows over more batches, as the rows made of them come in an order of their own.
        cross_document: False: a row's documents know nothing of one another; the last token of each is not scored,
            document ids tell them apart. True: the row is one text; its tokens predict the next document's first
            token too, positions run through, and its document ids are all 0.
    """

    kind: Literal["concat", "best_fit", "one_per_row"] = "concat"
    long_documents: Literal["split", "crop"] = "split"
    look_ahead: int = 1024
    cross_document: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("concat", "best_fit", "one_per_row"):
            raise DataError(f"packing is 'concat', 'best_fit' or 'one_per_row', not {self.kind!r}")
        if self.long_documents not in ("split", "crop"):
            raise DataError(f"long_documents is 'split' or 'crop', not {self.long_documents!r}")
        if self.kind == "concat" and self.long_documents == "crop":
            raise DataError("packing 'concat' never crops a document; use 'best_fit' or 'one_per_row'")
        if self.look_ahead < 1:
            raise DataError(f"look_ahead must be at least 1, not {self.look_ahead}")


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of document `k` of a block: its share of one row.

    `goes_on` says that the token after the piece is used too, in a later row.
    """

    block: Block
    k: int
    start: int
    stop: int
    goes_on: bool


@dataclass(slots=True)
class Row:
    """One row, or what there is of it.

    Attributes:
        tokens: how many; fewer than S leave padding, and none at all means that the source has come to its end.
        documents: how many documents have their last token in the row.
        cropped: tokens that were left out of the row's documents.
        skipped: documents without tokens that were passed over.
        pieces: what is in the row, if that is wanted.
    """

    tokens: int = 0
    documents: int = 0
    cropped: int = 0
    skipped: int = 0
    pieces: list[Piece] = field(default_factory=list)


class Place(NamedTuple):
    """Where a source's next row begins.

    Attributes:
        cursor: between two documents of the queue.
        offset: tokens already used of the document after the cursor.
        window: for "best_fit": how many rows, packed for which S, are already used of the documents looked at together
            that begin at the cursor: `(S, rows)`, several where S has changed in between.
    """

    cursor: Cursor
    offset: int = 0
    window: tuple[tuple[int, int], ...] = ()


class Packer(Protocol):
    """Cuts a queue into rows."""

    def place(self) -> Place:
        """Say where the next row begins. Equal for all that have cut the same rows."""
        ...

    def seek(self, place: Place, *, lenient: bool = False) -> None:
        """Go to a place.

        Args:
            place: where the next row is to begin.
            lenient: whether the documents may be others than when the place was noted (a user has allowed it): a place
                inside of a document that is too short now is then the place after it.
        """
        ...

    def next_row(self, seq_len: int, wanted: bool) -> Row:
        """Cut the next row.

        Args:
            seq_len: S, tokens per row.
            wanted: whether to list the row's pieces.

        Raises:
            DataError: a whole epoch has no tokens, or the documents are not those of the place that was sought. Errors
                of the source pass through. The packer then has to be told to `seek`.
        """
        ...


class Walk:
    """A place in a feed's queue, down to the token, that goes forward until `max_epochs` epochs are over."""

    def __init__(self, feed: Feed, max_epochs: int | None) -> None:
        self._feed = feed
        self._max_epochs = max_epochs
        self.seek(feed.start, 0)

    def seek(self, cursor: Cursor, offset: int, *, lenient: bool = False) -> None:
        """Go to a place; nothing is read yet."""
        self._block: Block | None = None
        self._cursor = cursor  # where the block begins, or the one to be read
        self._boundary = cursor  # right after the last document that is used up, as long as that is in no block here
        self._offset = offset
        self._lenient = lenient
        self._pos = 0  # tokens of the block that are used up
        self._k = 0  # the document after them
        self._uncounted = 0  # documents without tokens that were passed over in earlier blocks

    @property
    def block(self) -> Block:
        """The block of the document at hand; only after `ready`."""
        assert self._block is not None
        return self._block

    @property
    def k(self) -> int:
        """The number in its block of the document at hand."""
        return self._k

    @property
    def used(self) -> int:
        """Tokens already used of the document at hand; only after `ready`."""
        return self._pos - (self.block.ends[self._k] - self.block.lengths[self._k])

    def place(self) -> tuple[Cursor, int]:
        """Give the cursor and the offset of the next token, the same ones however the queue was cut into blocks."""
        if self._block is None:
            return self._boundary, self._offset
        if self._k < len(self._block) and (used := self.used) > 0:
            return self._block.before(self._k), used
        return (self._block.behind(self._k - 1) if self._k > 0 else self._boundary), 0

    def ready(self) -> bool:
        """Make sure that there is a document at hand; False where the epochs are over."""
        first_epoch = self._cursor[0]
        while self._block is None or self._k == len(self._block):
            if self._block is not None:
                self._leave(self._block)
            if self._max_epochs is not None and self._cursor[0] >= self._max_epochs:
                return False
            # Two epochs on, the one in between was seen from its first document to its last.
            if self._cursor[0] >= first_epoch + 2:
                raise DataError(f"{self._feed.name!r} gives not one token in a whole epoch: all documents are empty")
            self._block = self._feed.read(self._cursor)
            if self._offset > 0:
                self._enter(self._block)
        return True

    def take(self, count: int, row: Row, wanted: bool) -> None:
        """Move up to `count` tokens of the block at hand into a row; only after `ready`."""
        block, k, begin = self.block, self._k, self._pos
        end = min(begin + count, block.total)
        last = bisect_left(block.ends, end)  # the document of the last token
        self._count_passed(block, last, row)
        if wanted:
            for number in range(k, last + 1):
                length = block.lengths[number]
                first = block.ends[number] - length
                stop = min(end - first, length)
                row.pieces.append(Piece(block, number, max(begin - first, 0), stop, stop < length))
        self._pos = end
        self._k = bisect_right(block.ends, end, lo=k)
        row.tokens += end - begin
        row.documents += self._k - k

    def skip_document(self, row: Row) -> int:
        """Go to the end of the document at hand; only after `ready`. Returns the number of tokens that it had left."""
        block = self.block
        self._count_passed(block, self._k, row)
        left = block.ends[self._k] - self._pos
        self._pos = block.ends[self._k]
        self._k += 1
        return left

    def take_uncounted(self) -> int:
        """Give the number of documents without tokens after the last one, once the epochs are over."""
        # Only what is counted is behind the place: who goes on from before passes over the rest again, and counts it.
        self._boundary = self._cursor
        count, self._uncounted = self._uncounted, 0
        return count

    def _count_passed(self, block: Block, last: int, row: Row) -> None:
        # Counted when the next document with tokens begins: that does not depend on how the queue is cut into blocks.
        row.skipped += self._uncounted + block.passed[last]
        self._uncounted = -block.passed[last]

    def _leave(self, block: Block) -> None:
        if len(block) > 0:
            self._boundary = block.behind(len(block) - 1)
        self._uncounted += block.passed[-1]
        self._cursor = block.after
        self._block, self._pos, self._k = None, 0, 0

    def _enter(self, block: Block) -> None:
        """Go on inside of the first document."""
        offset, self._offset = self._offset, 0
        at_hand = len(block) > 0 and block.passed[0] == 0
        if at_hand and offset < block.lengths[0]:
            self._pos = offset
        elif not self._lenient:
            raise DataError(
                f"{self._feed.name!r}: the saved place is {offset} tokens into the document at {list(self._cursor)}, "
                f"which has {block.lengths[0] if at_hand else 0}: the data have changed"
            )
        elif at_hand:
            self._pos, self._k = block.lengths[0], 1


class Concat:
    """Documents end to end, cut every S tokens."""

    def __init__(self, feed: Feed, max_epochs: int | None) -> None:
        self._walk = Walk(feed, max_epochs)

    def place(self) -> Place:
        """Say where the next row begins."""
        return Place(*self._walk.place())

    def seek(self, place: Place, *, lenient: bool = False) -> None:
        """Go to a place."""
        self._walk.seek(place.cursor, place.offset, lenient=lenient)

    def next_row(self, seq_len: int, wanted: bool) -> Row:
        """Cut the next row; only the last one before the end of the epochs has fewer than S tokens."""
        row = Row()
        while row.tokens < seq_len:
            if not self._walk.ready():
                row.skipped += self._walk.take_uncounted()
                break
            self._walk.take(seq_len - row.tokens, row, wanted)
        return row


class OnePerRow:
    """Each document in rows of its own."""

    def __init__(self, feed: Feed, max_epochs: int | None, *, crop: bool) -> None:
        self._walk = Walk(feed, max_epochs)
        self._crop = crop

    def place(self) -> Place:
        """Say where the next row begins."""
        return Place(*self._walk.place())

    def seek(self, place: Place, *, lenient: bool = False) -> None:
        """Go to a place."""
        self._walk.seek(place.cursor, place.offset, lenient=lenient)

    def next_row(self, seq_len: int, wanted: bool) -> Row:
        """Cut the next row: the next document, or the next S tokens of one that is longer."""
        row, walk = Row(), self._walk
        if not walk.ready():
            row.skipped += walk.take_uncounted()
            return row
        left = walk.block.lengths[walk.k] - walk.used
        walk.take(min(seq_len, left), row, wanted)
        if self._crop and left > seq_len:
            row.cropped = walk.skip_document(row)
            row.documents += 1
            row.pieces = [piece._replace(goes_on=False) for piece in row.pieces]
        return row
