"""Global batch after global batch: every rank walks all the rows, and builds those that are its own.

So where things stand is the same everywhere without a word between ranks, and the number of ranks decides who sees a
row, never what is in it.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from titan_data.batching.batch import Batch, build_batch
from titan_data.batching.mixing import Phase, Weighted, choose_source
from titan_data.batching.packing import Packer, Place, Row
from titan_data.errors import DataError

_log = logging.getLogger(__name__)


class Tally(NamedTuple):
    """What one source has given so far, over all ranks.

    Attributes:
        tokens: real ones, without padding.
        documents: whose last token was given (or cropped).
        padding: tokens that filled up its rows.
        cropped: tokens left out of documents that are longer than a row.
        skipped: documents without tokens that were passed over.
    """

    tokens: int = 0
    documents: int = 0
    padding: int = 0
    cropped: int = 0
    skipped: int = 0

    def plus(self, row: Row, seq_len: int) -> "Tally":
        """Count a row."""
        return Tally(
            self.tokens + row.tokens,
            self.documents + row.documents,
            self.padding + (seq_len - row.tokens if row.tokens > 0 else 0),
            self.cropped + row.cropped,
            self.skipped + row.skipped,
        )


class Standing(NamedTuple):
    """Where one source stands.

    Attributes:
        place: where its next row begins.
        tally: what it has given.
        share: tokens it has given since the weights in use hold.
        ended: whether its epochs are over.
    """

    place: Place
    tally: Tally = Tally()
    share: int = 0
    ended: bool = False


class Position(NamedTuple):
    """Where a loader stands between two global batches.

    Attributes:
        step: number of the next global batch.
        phase: the step from which the weights hold that the sources' `share` counts.
        sources: where each source stands, in the order of the sources.
    """

    step: int
    phase: int
    sources: tuple[Standing, ...]


class Reader:
    """Makes global batch 0, 1, 2, … or goes on from any position.

    Args:
        parts: the sources.
        packers: one for each source.
        phases: weights and lengths by step.
        rows: G, rows of a global batch.
        own: which of them are built.
        cross_document: whether rows are one text each.
        pad_id: the token that fills rows up.
        vocab_size: ids must be below, or None.
    """

    def __init__(
        self,
        parts: Sequence[Weighted],
        packers: Sequence[Packer],
        phases: Sequence[Phase],
        *,
        rows: int,
        own: range,
        cross_document: bool,
        pad_id: int,
        vocab_size: int | None,
    ) -> None:
        self._parts = parts
        self._packers = packers
        self._phases = phases
        self._rows = rows
        self._own = own
        self._cross_document = cross_document
        self._pad_id = pad_id
        self._vocab_size = vocab_size
        self._lenient: frozenset[int] = frozenset()
        self.position = Position(0, 0, tuple(Standing(packer.place()) for packer in packers))

    def phase(self, step: int) -> Phase:
        """Give the phase in which a step lies."""
        return self._phases[bisect_right([phase.from_step for phase in self._phases], step) - 1]

    def resume(self, position: Position, lenient: frozenset[int]) -> None:
        """Go to a position of another reader.

        Args:
            position: where to go on.
            lenient: numbers of the sources whose documents may be others than when the position was noted.
        """
        self._lenient = lenient
        self.seek(position)

    def seek(self, position: Position) -> None:
        """Go to a position; nothing is read yet."""
        for number, (packer, standing) in enumerate(zip(self._packers, position.sources, strict=True)):
            packer.seek(standing.place, lenient=number in self._lenient)
        self.position = position

    def read(self) -> Batch | None:
        """Make the next global batch's own rows.

        Returns:
            The batch; None where the sources have ended.

        Raises:
            DataError: a source has ended that must not, or gives what cannot be used. Errors of sources pass through.
                The position is then that of the step before, and the step may be tried again.
        """
        before = self.position
        try:
            batch, after = self._read(before)
        except BaseException:
            # A step happens as a whole or not at all: a failed one leaves a position that can be saved.
            self.seek(before)
            raise
        if batch is None:
            self.seek(before)
        else:
            self.position = after
        return batch

    def _read(self, position: Position) -> tuple[Batch | None, Position]:
        phase = self.phase(position.step)
        tallies = [standing.tally for standing in position.sources]
        # New weights hold from where they begin; what was taken before is not made up for.
        same = phase.from_step == position.phase
        shares = [standing.share if same else 0 for standing in position.sources]
        ended = [standing.ended for standing in position.sources]
        own_rows: list[tuple[str, Row]] = []
        for number in range(self._rows):
            wanted = number in self._own
            source, row = self._next_row(phase, wanted, tallies, shares, ended)
            if source is None and number == 0:
                return None, position
            if wanted:
                own_rows.append(("" if source is None else self._parts[source].source.name, row))
        batch = build_batch(
            own_rows,
            phase.seq_len,
            cross_document=self._cross_document,
            pad_id=self._pad_id,
            vocab_size=self._vocab_size,
        )
        standings = (
            Standing(packer.place(), tally, share, end)
            for packer, tally, share, end in zip(self._packers, tallies, shares, ended, strict=True)
        )
        return batch, Position(position.step + 1, phase.from_step, tuple(standings))

    def _next_row(
        self, phase: Phase, wanted: bool, tallies: list[Tally], shares: list[int], ended: list[bool]
    ) -> tuple[int | None, Row]:
        """Take one row from the source whose turn it is, and count it; an empty one where all have ended."""
        while True:
            weights = [0.0 if end else weight for weight, end in zip(phase.weights, ended, strict=True)]
            source = choose_source(weights, shares, phase.seq_len)
            if source is None:
                return None, Row()
            row = self._packers[source].next_row(phase.seq_len, wanted)
            tallies[source] = tallies[source].plus(row, phase.seq_len)
            if row.tokens > 0:
                shares[source] += row.tokens
                return source, row
            ended[source] = True
            self._end(source, tallies[source], last=all(ended))

    def _end(self, source: int, tally: Tally, *, last: bool) -> None:
        part = self._parts[source]
        name = part.source.name
        if tally.tokens == 0:
            raise DataError(f"source {name!r} gives not one token: all its documents are empty")
        if part.at_end == "error":
            raise DataError(
                f"source {name!r} has been used {part.max_epochs} times, which is its max_epochs: allow more epochs, "
                'add documents, lower its weight, or set at_end="drop" to go on without it'
            )
        if not last:
            _log.warning(
                "source %r has been used %d times, its max_epochs, and leaves the mixture", name, part.max_epochs
            )
