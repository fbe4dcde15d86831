"""Packing: its options, what a packed sequence is, and the protocol of packers.

A packer cuts one source's queue of documents into sequences, and reports the state from which the next one follows. The
batch reader calls it for each sequence and says whether the pieces are needed: a rank follows the sequences of the
other ranks by lengths alone. Packers are in `cutting` (`Concat`, `OnePerSequence`) and `best_fit` (`BestFit`).
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from titan_data.batching.checks import as_int
from titan_data.batching.documents import Block, Cursor
from titan_data.errors import DataError


@dataclass(frozen=True)
class Packing:
    """How documents become sequences of S tokens.

    Attributes:
        kind: "concat" concatenates documents and cuts every S tokens: no padding. "best_fit" packs complete documents,
            `packing_window` at a time, each into the sequence where it leaves the least space: hardly any document is
            cut, a little padding. "one_per_row" gives each document its own sequences.
        long_documents: For the last two kinds, how documents longer than a sequence are handled: "split" over several
            sequences, or "crop" to their first S tokens (cropped tokens are counted).
        packing_window: Number of documents that "best_fit" packs together. A larger window leaves less padding, and
            spreads the sequences of a long document over more batches, as a window's sequences are shuffled.
        cross_document: False: documents in a sequence are independent; the last token of each is not scored, and
            document ids tell them apart. True: a sequence is one text; tokens also predict the first token of the next
            document, positions run through, and all document ids are 0.

    Raises:
        DataError: If a value is not one of those above, or the values contradict one another.
    """

    kind: Literal["concat", "best_fit", "one_per_row"] = "concat"
    long_documents: Literal["split", "crop"] = "split"
    packing_window: int = 1024
    cross_document: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "packing_window", as_int("packing_window", self.packing_window))
        object.__setattr__(self, "cross_document", bool(self.cross_document))
        if self.kind not in ("concat", "best_fit", "one_per_row"):
            raise DataError(f"packing must be 'concat', 'best_fit' or 'one_per_row', not {self.kind!r}")
        if self.long_documents not in ("split", "crop"):
            raise DataError(f"long_documents must be 'split' or 'crop', not {self.long_documents!r}")
        if self.kind == "concat" and self.long_documents == "crop":
            raise DataError("packing 'concat' never crops a document; use 'best_fit' or 'one_per_row'")
        if self.packing_window < 1:
            raise DataError(f"packing_window must be at least 1, not {self.packing_window}")


class Piece(NamedTuple):
    """The tokens of one document that are in one sequence: `start` to `stop` (exclusive) of document `k` of a block.

    `continues` is True if the token after the piece is used too, in a later sequence.
    """

    block: Block
    k: int
    start: int
    stop: int
    continues: bool


@dataclass(slots=True)
class PackedSequence:
    """The contents of one sequence.

    Attributes:
        tokens: Number of tokens; fewer than S leave padding, and 0 means that the source has ended.
        documents: Number of documents whose last token is in the sequence.
        cropped: Tokens that were cropped from its documents.
        skipped: Documents without tokens that were skipped.
        pieces: The pieces in order, if they were asked for.
    """

    tokens: int = 0
    documents: int = 0
    cropped: int = 0
    skipped: int = 0
    pieces: list[Piece] = field(default_factory=list)


class PackerState(NamedTuple):
    """Where a source's next sequence begins.

    Attributes:
        cursor: Between two documents of the queue.
        offset: Tokens of the document after the cursor that are already used.
        window: For "best_fit": `(S, sequences)`, how many sequences of length S are already used of the window that
            begins at the cursor; several entries if S has changed within the window.
    """

    cursor: Cursor
    offset: int = 0
    window: tuple[tuple[int, int], ...] = ()


class Packer(Protocol):
    """Cuts a queue into sequences."""

    def state(self) -> PackerState:
        """Return where the next sequence begins; equal for all packers that have cut the same sequences."""
        ...

    def seek(self, state: PackerState, *, lenient: bool = False) -> None:
        """Continue from a state; nothing is read yet.

        Args:
            state: Where the next sequence begins.
            lenient: Whether the documents may have changed since the state was saved (the user has allowed it): an
                offset beyond the end of its document then means the next document.
        """
        ...

    def next_sequence(self, seq_len: int, *, with_pieces: bool) -> PackedSequence:
        """Cut the next sequence.

        Args:
            seq_len: S, tokens per sequence.
            with_pieces: Whether to list the sequence's pieces.

        Raises:
            DataError: If a full epoch has no tokens, or the documents have changed since the state was saved. Errors
                of the source pass through. After an error the packer needs a `seek`.
        """
        ...
