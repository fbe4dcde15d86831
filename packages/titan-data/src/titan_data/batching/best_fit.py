"""Best-fit packing: complete documents into sequences, each into the sequence where it leaves the least space.

`BestFit` is the packer; `best_fit` is the bin packing algorithm.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

from titan_data.batching.cutting import QueueReader
from titan_data.batching.documents import Block
from titan_data.batching.feeds import Feed
from titan_data.batching.packing import PackedSequence, PackerState, Piece
from titan_data.batching.permutation import Permutation
from titan_data.errors import DataError

# The documents of a window are read (and text is held in memory) together: a window ends after this many tokens.
_MAX_TOKENS = 1 << 24


# `(number, start, stop, cropped)`: tokens `start` to `stop` of document `number` of the window, after which `cropped`
# tokens are left out. Regular tuples, of which a window holds a thousand: Python's garbage collector does not visit
# those that contain only numbers, and with many sources it took a third of a step.
_Part = tuple[int, int, int, int]


class BestFit:
    """Packs a window of documents at a time into as few sequences as best-fit-decreasing finds.

    A window never crosses the end of an epoch, so each epoch's tokens are used before the next one's. Its sequences are
    shuffled, so that those of a long document are spread over many batches instead of filling a few. The state is the
    beginning of the window and the number of its sequences that are used: a resume packs the window again, which gives
    the same sequences. If S changes within a window, what is left of its documents is packed again for the new S.

    Args:
        feed: Where the documents come from.
        max_epochs: Number of epochs after which the source ends, or None.
        window: Documents in a window.
        crop: Whether documents longer than a sequence are cropped; otherwise they are split.
    """

    def __init__(self, feed: Feed, max_epochs: int | None, *, window: int, crop: bool) -> None:
        self._feed = feed
        self._queue = QueueReader(feed, max_epochs)
        self._window = window
        self._crop = crop
        self.seek(PackerState(feed.start))

    def state(self) -> PackerState:
        """Return where the next sequence begins."""
        return self._begin._replace(window=tuple((seq_len, count) for seq_len, count in self._used if count > 0))

    def seek(self, state: PackerState, *, lenient: bool = False) -> None:
        """Continue from a state; nothing is read yet."""
        self._queue.seek(state.cursor, 0)
        self._begin = PackerState(state.cursor)
        self._to_repeat = state.window
        self._lenient = lenient
        self._blocks: list[Block] = []  # of each document of the window, and its number in it
        self._ks: list[int] = []
        self._sequences: deque[list[_Part]] = deque()
        self._used: list[tuple[int, int]] = list(state.window)

    def next_sequence(self, seq_len: int, *, with_pieces: bool) -> PackedSequence:
        """Return the next sequence of the window, or the first of the next window."""
        sequence = PackedSequence()
        while not self._sequences:
            if not self._open_window():
                sequence.skipped += self._queue.count_trailing_empty()
                self._begin = PackerState(self._queue.cursor_and_offset()[0])
                return sequence
        if not self._used or self._used[-1][0] != seq_len:
            self._pack([part for parts in self._sequences for part in parts], seq_len)
        self._fill(sequence, self._sequences.popleft(), with_pieces=with_pieces)
        self._used[-1] = (seq_len, self._used[-1][1] + 1)
        if not self._sequences:
            self._close_window(sequence)
        return sequence

    def _open_window(self) -> bool:
        """Read the next window's documents and drop the sequences already used; False if all epochs are used up."""
        if not self._queue.ready():
            return False
        epoch = self._queue.block.cursor_before(self._queue.k)[0]
        self._skipped = PackedSequence()  # collects the count of documents without tokens
        tokens = 0
        while len(self._blocks) < self._window and tokens < _MAX_TOKENS and self._queue.ready():
            block, k = self._queue.block, self._queue.k
            if block.cursor_before(k)[0] != epoch:
                break
            self._blocks.append(block)
            self._ks.append(k)
            tokens += self._queue.skip_document(self._skipped)
        lengths = (block.lengths[k] for block, k in zip(self._blocks, self._ks, strict=True))
        parts = [(number, 0, length, 0) for number, length in enumerate(lengths)]
        self._sequences = deque([parts])
        to_repeat, self._to_repeat, self._used = self._to_repeat, (), []
        for seq_len, count in to_repeat:
            self._pack([part for parts in self._sequences for part in parts], seq_len)
            if count > len(self._sequences) and not self._lenient:
                raise DataError(
                    f"{self._feed.name!r}: the saved state is after {count} sequences of the window at "
                    f"{list(self._begin.cursor)}, but its documents fill {len(self._sequences)}: the data have changed"
                )
            for _ in range(min(count, len(self._sequences))):
                self._sequences.popleft()
            self._used[-1] = (seq_len, count)
        if not self._sequences:
            self._close_window(PackedSequence())
        return True

    def _pack(self, parts: list[_Part], seq_len: int) -> None:
        """Pack parts of documents into sequences of S tokens, and shuffle the sequences."""
        cut: list[_Part] = []
        for number, start, stop in _rejoin(parts):
            if self._crop:
                end = min(start + seq_len, stop)
                cut.append((number, start, end, stop - end))
            else:
                cut += [(number, at, min(at + seq_len, stop), 0) for at in range(start, stop, seq_len)]
        bins = best_fit([stop - start for _, start, stop, _ in cut], seq_len)
        order = (
            Permutation(len(bins), key=f"{self._feed.identity}/{list(self._begin.cursor)}/{seq_len}") if bins else ()
        )
        self._sequences = deque([cut[i] for i in bins[at]] for at in order)
        self._used.append((seq_len, 0))

    def _fill(self, sequence: PackedSequence, parts: list[_Part], *, with_pieces: bool) -> None:
        for number, start, stop, cropped in parts:
            block, k = self._blocks[number], self._ks[number]
            length = block.lengths[k]
            sequence.tokens += stop - start
            sequence.cropped += cropped
            sequence.documents += stop + cropped == length
            if with_pieces:
                sequence.pieces.append(Piece(block, k, start, stop, stop + cropped < length))

    def _close_window(self, sequence: PackedSequence) -> None:
        sequence.skipped += self._skipped.skipped
        self._begin = PackerState(self._queue.cursor_and_offset()[0])
        self._blocks, self._ks, self._used = [], [], []


def _rejoin(parts: list[_Part]) -> list[tuple[int, int, int]]:
    """Undo cuts that were made for another S: `(document, start, stop)` of what is left of each, in order.

    Otherwise neighboring pieces of a document, each short for a larger S, could meet in one sequence as two documents.
    """
    joined: list[tuple[int, int, int]] = []
    for number, start, stop, cropped in sorted(parts):
        if joined and joined[-1][0] == number and joined[-1][2] == start:
            joined[-1] = (number, joined[-1][1], stop + cropped)
        else:
            joined.append((number, start, stop + cropped))
    return joined


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pack items into bins by best-fit-decreasing: the longest first, each into the fullest bin that has space for it.

    Free space takes at most `size` different values, so open bins are grouped by it: each item is placed with one
    bisection, in O(n log n) for n items.

    Args:
        lengths: Lengths of the items, each from 1 to `size`.
        size: Capacity of a bin.

    Returns:
        For each bin the numbers of its items, ascending; the bins are ordered by their first numbers.
    """
    bins: list[list[int]] = []
    free: list[int] = []  # the different amounts of free space of open bins, ascending
    open_bins: dict[int, list[int]] = {}  # by free space
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, lengths[number])
        if at == len(free):
            bins.append([])
            chosen, space = len(bins) - 1, size
        else:
            space = free[at]
            chosen = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space], free[at]
        bins[chosen].append(number)
        if (left := space - lengths[number]) > 0:
            if left not in open_bins:
                open_bins[left] = []
                insort(free, left)
            open_bins[left].append(chosen)
    return sorted(sorted(numbers) for numbers in bins)
