"""Best-fit packing: whole documents into rows, each into the row where it leaves the least room."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from titan_data.batching.documents import Block
from titan_data.batching.feeds import Feed
from titan_data.batching.packing import Piece, Place, Row, Walk
from titan_data.batching.permutation import Permutation
from titan_data.errors import DataError

# Documents looked at together are read (and, if they are text, kept) at once: so many tokens are enough.
_MAX_TOKENS = 1 << 24


class _Part(NamedTuple):
    """Tokens `start` to `stop` of the window's document `number`, after which `cropped` tokens are left out."""

    number: int
    start: int
    stop: int
    cropped: int


class BestFit:
    """Packs `look_ahead` documents at a time (a window) into as few rows as best-fit-decreasing finds.

    A window ends with its epoch at the latest, so that each epoch's tokens are used before the next one's. Its rows
    come in an order of their own, so that a long document's rows are spread over many batches instead of filling a few.
    Where a row stands is told by the window's beginning and a count of rows: the window is packed again on resume.

    Args:
        feed: where the documents come from.
        max_epochs: after how many epochs the source ends, or None.
        look_ahead: documents in a window.
        crop: whether documents longer than a row are cropped; otherwise they are split into full rows and a rest.
    """

    def __init__(self, feed: Feed, max_epochs: int | None, *, look_ahead: int, crop: bool) -> None:
        self._feed = feed
        self._walk = Walk(feed, max_epochs)
        self._look_ahead = look_ahead
        self._crop = crop
        self.seek(Place(feed.start))

    def place(self) -> Place:
        """Say where the next row begins."""
        return self._begin._replace(window=tuple((seq_len, rows) for seq_len, rows in self._used if rows > 0))

    def seek(self, place: Place, *, lenient: bool = False) -> None:
        """Go to a place; nothing is read yet."""
        self._walk.seek(place.cursor, 0)
        self._begin = Place(place.cursor)
        self._to_repeat = place.window
        self._lenient = lenient
        self._documents: list[tuple[Block, int]] = []
        self._rows: deque[list[_Part]] = deque()
        self._used: list[tuple[int, int]] = list(place.window)

    def next_row(self, seq_len: int, wanted: bool) -> Row:
        """Give the next row of the window, or the first of the next window."""
        row = Row()
        while not self._rows:
            if not self._open_window():
                row.skipped += self._walk.take_uncounted()
                self._begin = Place(self._walk.place()[0])
                return row
        if not self._used or self._used[-1][0] != seq_len:
            self._pack([part for parts in self._rows for part in parts], seq_len)
        self._hand_out(self._rows.popleft(), row, wanted)
        self._used[-1] = (seq_len, self._used[-1][1] + 1)
        if not self._rows:
            self._close_window(row)
        return row

    def _open_window(self) -> bool:
        """Read the next window's documents and come to where it stands; False where the epochs are over."""
        if not self._walk.ready():
            return False
        epoch = self._walk.block.before(self._walk.k)[0]
        self._passed = Row()  # collects the count of documents without tokens
        tokens = 0
        while len(self._documents) < self._look_ahead and tokens < _MAX_TOKENS and self._walk.ready():
            block, k = self._walk.block, self._walk.k
            if block.before(k)[0] != epoch:
                break
            self._documents.append((block, k))
            tokens += self._walk.skip_document(self._passed)
        parts = [_Part(i, 0, block.lengths[k], 0) for i, (block, k) in enumerate(self._documents)]
        self._rows = deque([parts])
        to_repeat, self._to_repeat, self._used = self._to_repeat, (), []
        for seq_len, rows in to_repeat:
            self._pack([part for parts in self._rows for part in parts], seq_len)
            if rows > len(self._rows) and not self._lenient:
                raise DataError(
                    f"{self._feed.name!r}: the saved place is after {rows} rows of the documents from "
                    f"{list(self._begin.cursor)} on, which make {len(self._rows)}: the data have changed"
                )
            for _ in range(min(rows, len(self._rows))):
                self._rows.popleft()
            self._used[-1] = (seq_len, rows)
        if not self._rows:
            self._close_window(Row())
        return True

    def _pack(self, parts: list[_Part], seq_len: int) -> None:
        cut: list[_Part] = []
        for number, start, stop, cropped in sorted(parts):
            if self._crop:
                end = min(start + seq_len, stop)
                cut.append(_Part(number, start, end, cropped + stop - end))
            else:
                cut += [_Part(number, at, min(at + seq_len, stop), 0) for at in range(start, stop, seq_len)]
        rows = best_fit([part.stop - part.start for part in cut], seq_len)
        order = Permutation(len(rows), key=f"{self._feed.name}/{list(self._begin.cursor)}/{seq_len}") if rows else ()
        self._rows = deque([cut[i] for i in rows[at]] for at in order)
        self._used.append((seq_len, 0))

    def _hand_out(self, parts: list[_Part], row: Row, wanted: bool) -> None:
        for number, start, stop, cropped in parts:
            block, k = self._documents[number]
            length = block.lengths[k]
            row.tokens += stop - start
            row.cropped += cropped
            row.documents += stop + cropped == length
            if wanted:
                row.pieces.append(Piece(block, k, start, stop, stop + cropped < length))

    def _close_window(self, row: Row) -> None:
        row.skipped += self._passed.skipped
        self._begin = Place(self._walk.place()[0])
        self._documents, self._used = [], []


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Put things into bins by best-fit-decreasing: the longest first, each into the fullest bin that has room.

    Args:
        lengths: of the things, each from 1 to `size`.
        size: of a bin.

    Returns:
        For each bin the numbers of the things in it, ascending; the bins ordered by their first numbers.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the rooms that open bins have, ascending, each once
    open_bins: dict[int, list[int]] = {}  # by room
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[number])
        if at == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, size
        else:
            room = rooms[at]
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        bins[chosen].append(number)
        if (left := room - lengths[number]) > 0:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(chosen)
    return sorted(sorted(numbers) for numbers in bins)
