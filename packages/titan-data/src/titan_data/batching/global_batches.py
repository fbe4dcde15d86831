"""The global batch reader: every rank follows all sequences of a global batch, and builds its own.

So the state is the same on all ranks without communication, and the number of ranks decides who builds a sequence,
never what is in it. Called by `Loader` (in its prefetch thread); for each sequence it chooses a source and asks the
source's packer.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from titan_data.batching.batch import Batch, build_batch
from titan_data.batching.mixing import MixtureSource, ResolvedPhase, Turns
from titan_data.batching.packing import PackedSequence, Packer, PackerState
from titan_data.errors import DataError

_log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """What one source has contributed so far, over all ranks.

    Attributes:
        tokens: Tokens, without padding.
        documents: Documents whose last token was used (or cropped).
        padding: Padding tokens in its sequences.
        cropped: Tokens cropped from documents that are longer than a sequence.
        skipped: Documents without tokens.
    """

    tokens: int = 0
    documents: int = 0
    padding: int = 0
    cropped: int = 0
    skipped: int = 0

    def plus(self, sequence: PackedSequence, seq_len: int) -> "Counts":
        """Add a sequence."""
        return Counts(
            self.tokens + sequence.tokens,
            self.documents + sequence.documents,
            self.padding + (seq_len - sequence.tokens if sequence.tokens > 0 else 0),
            self.cropped + sequence.cropped,
            self.skipped + sequence.skipped,
        )


class SourceState(NamedTuple):
    """The state of one source.

    Attributes:
        packer: Where its next sequence begins.
        counts: What it has contributed so far.
        phase_tokens: Tokens it has contributed since the current phase began.
        ended: Whether its epochs are used up.
    """

    packer: PackerState
    counts: Counts = Counts()
    phase_tokens: int = 0
    ended: bool = False


class ReaderState(NamedTuple):
    """The state of a loader between two global batches.

    Attributes:
        step: Number of the next global batch.
        phase_start: First step of the phase that the sources' `phase_tokens` belong to.
        sources: The state of each source, in the order of the sources.
    """

    step: int
    phase_start: int
    sources: tuple[SourceState, ...]


class GlobalBatchReader:
    """Reads global batch 0, 1, 2, …, or continues from any state.

    Args:
        parts: The sources.
        packers: One for each source.
        phases: Weights and sequence lengths by step.
        global_batch_size: G, sequences of a global batch.
        own: Which of them this rank builds.
        cross_document: Whether a sequence is one text; see `Packing`.
        pad_id: The padding token.
        vocab_size: Ids must be below it; None for no limit.
    """

    def __init__(
        self,
        parts: Sequence[MixtureSource],
        packers: Sequence[Packer],
        phases: Sequence[ResolvedPhase],
        *,
        global_batch_size: int,
        own: range,
        cross_document: bool,
        pad_id: int,
        vocab_size: int | None,
    ) -> None:
        self._parts = parts
        self._packers = packers
        self._phases = phases
        self._global_batch_size = global_batch_size
        self._own = own
        self._cross_document = cross_document
        self._pad_id = pad_id
        self._vocab_size = vocab_size
        self._lenient: frozenset[int] = frozenset()
        self.state = ReaderState(0, 0, tuple(SourceState(packer.state()) for packer in packers))

    def phase(self, step: int) -> ResolvedPhase:
        """Return the phase of a step."""
        return self._phases[bisect_right([phase.from_step for phase in self._phases], step) - 1]

    def resume(self, state: ReaderState, lenient: frozenset[int]) -> None:
        """Continue from the state of another reader.

        Args:
            state: Where to continue.
            lenient: Numbers of the sources whose documents may have changed since the state was saved.
        """
        self._lenient = lenient
        self.seek(state)

    def seek(self, state: ReaderState) -> None:
        """Continue from a state; nothing is read yet."""
        for number, (packer, source) in enumerate(zip(self._packers, state.sources, strict=True)):
            packer.seek(source.packer, lenient=number in self._lenient)
        self.state = state

    def read(self) -> Batch | None:
        """Build this rank's sequences of the next global batch.

        Returns:
            The batch; None if the sources have ended.

        Raises:
            DataError: If a source with at_end="error" has ended, or its data cannot be used. Errors of sources pass
                through. The state is then still that before the step, and the step may be tried again.
        """
        before = self.state
        try:
            batch, after = self._read(before)
        except BaseException:
            # A step is atomic: after a failed one the state can be saved or the step tried again.
            self.seek(before)
            raise
        if batch is None:
            self.seek(before)
        else:
            self.state = after
        return batch

    def _read(self, state: ReaderState) -> tuple[Batch | None, ReaderState]:
        phase = self.phase(state.step)
        counts = [source.counts for source in state.sources]
        # Shares count from the beginning of a phase: what earlier phases took is not compensated.
        same = phase.from_step == state.phase_start
        phase_tokens = [source.phase_tokens if same else 0 for source in state.sources]
        ended = [source.ended for source in state.sources]
        turns = _turns(phase, phase_tokens, ended)
        own: list[tuple[str, PackedSequence]] = []
        for number in range(self._global_batch_size):
            is_own = number in self._own
            while (source := turns.next()) is not None:
                sequence = self._packers[source].next_sequence(phase.seq_len, with_pieces=is_own)
                counts[source] = counts[source].plus(sequence, phase.seq_len)
                phase_tokens[source] += sequence.tokens
                if sequence.tokens > 0:
                    turns.took(source, sequence.tokens)
                    break
                ended[source] = True
                self._end(source, counts[source], last=all(ended))
                turns = _turns(phase, phase_tokens, ended)
            else:
                if number == 0:
                    return None, state
                sequence = PackedSequence()
            if is_own:
                own.append(("" if source is None else self._parts[source].source.name, sequence))
        batch = build_batch(
            own,
            phase.seq_len,
            cross_document=self._cross_document,
            pad_id=self._pad_id,
            vocab_size=self._vocab_size,
        )
        sources = map(SourceState, (packer.state() for packer in self._packers), counts, phase_tokens, ended)
        return batch, ReaderState(state.step + 1, phase.from_step, tuple(sources))

    def _end(self, source: int, counts: Counts, *, last: bool) -> None:
        """Raise or log the end of a source."""
        part = self._parts[source]
        name = part.source.name
        if counts.tokens == 0:
            raise DataError(f"source {name!r} has no tokens: all its documents are empty")
        if part.at_end == "error":
            raise DataError(
                f"source {name!r} has been used for {part.max_epochs} epochs, its max_epochs: raise max_epochs, "
                'add documents, lower its weight, or set at_end="drop" to continue without it'
            )
        if not last:
            _log.warning(
                "source %r has been used for %d epochs, its max_epochs, and leaves the mixture", name, part.max_epochs
            )


def _turns(phase: ResolvedPhase, tokens: Sequence[int], ended: Sequence[bool]) -> Turns:
    weights = [0.0 if end else weight for weight, end in zip(phase.weights, ended, strict=True)]
    return Turns(weights, tokens, phase.seq_len)
