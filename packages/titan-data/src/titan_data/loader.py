"""The loader: global batch n is a function of (source, tokenizer, sizes, seed, n), and of nothing else.

The global batch has G rows. Row j of every global batch is lane j's next S tokens. A lane holds one document at a
time; when it has run out, it takes the next of one queue that all lanes share, and lanes are served in the order
j = 0 .. G-1. Every rank walks all the lanes, so that where things stand is the same everywhere without a word
between ranks, and builds tensors only for its own rows. So the number of ranks decides who sees a row, never what
is in it.
"""

from collections.abc import Mapping
from typing import Any, Self

from titan_data.documents import DocumentNumber, open_queue
from titan_data.errors import DataError
from titan_data.packing import Batch, Document, Lane, document_tokens, fill_row, pack_rows
from titan_data.sources import RandomAccessSource, Source
from titan_data.state import STATE_VERSION, LoaderState, check_state
from titan_data.tokenizer import Tokenizer


class Loader:
    """An endless iterator over this rank's rows of global batch 0, 1, 2, …, resumable on any number of ranks.

    Each document is used once per epoch, and the next epoch follows without a gap. Documents without tokens are
    passed over.

    Args:
        source: where documents come from.
        tokenizer: turns them into ids.
        seq_len: S, tokens per row.
        global_batch_size: G, rows per step over all ranks; a multiple of `world`.
        seed: decides the order of the documents where they are shuffled.
        shuffle: visit the documents of each epoch in an order of its own. A stream keeps its own order.
        rank: which share of the rows is this process's: rows `rank * G / world` up to `(rank + 1) * G / world`.
        world: number of ranks among which the rows are divided (of the data axis: ranks that work together on the
            same rows, as in tensor parallelism, count once).

    Attributes:
        step: number of global batches handed out so far.
        tokens_per_step: G * S.

    Raises:
        DataError: sizes that do not fit, or a source that cannot be used.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _check_sizes(seq_len, global_batch_size, rank, world)
        self._source = source
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        rows = global_batch_size // world
        self._own = range(rank * rows, (rank + 1) * rows)
        self._queue = open_queue(source, seed=seed, shuffle=shuffle)
        self._lanes = [Lane()] * global_batch_size
        self._settings: dict[str, int | bool | str] = {
            "source": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "seq_len": seq_len,
            "global_batch_size": global_batch_size,
            "seed": seed,
            "shuffle": shuffle and isinstance(source, RandomAccessSource),
        }
        self.step = 0
        self.tokens_per_step = global_batch_size * seq_len

    @property
    def epoch(self) -> int:
        """The epoch of the document that is fetched next; lanes may still hold documents of the one before."""
        return self._queue.position.epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        lanes = []
        own_rows = []
        before = self._queue.position
        try:
            for number, lane in enumerate(self._lanes):
                pieces, lane_after = fill_row(lane, self._seq_len, self._next_document)
                lanes.append(lane_after)
                if number in self._own:
                    own_rows.append(pieces)
            batch = pack_rows(own_rows, self._seq_len, self._source.name)
        except BaseException:
            # A step happens as a whole or not at all: after a failed read the state is that of the step before, so
            # it can be saved, and the same step can be tried again.
            self._queue.seek(before)
            raise
        self._lanes = lanes
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Say where the loader stands.

        Returns:
            Plain JSON, equal on all ranks (one copy of it is enough), of some 20 bytes per row of the global batch.
            Its form is `titan_data.state.LoaderState`.
        """
        state = LoaderState(
            version=STATE_VERSION,
            step=self.step,
            queue=list(self._queue.position),
            lanes=[None if document is None else [*document.number, offset] for document, offset in self._lanes],
            settings=dict(self._settings),
        )
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood, whatever its number of ranks was.

        Reads again the documents that lanes are in the middle of: for a random-access source these and no others,
        for a stream one pass from the earliest of them.

        Args:
            state: what `state_dict` gave, also after a way through JSON.

        Raises:
            DataError: another source, tokenizer, seed or size (all differences are listed), or a damaged state. The
                loader is then as it was.
        """
        checked = check_state(state, self._settings)
        numbers = {DocumentNumber(lane[0], lane[1]) for lane in checked["lanes"] if lane is not None}
        texts = self._queue.read(numbers)
        documents = {number: Document(number, document_tokens(self._tokenizer, text)) for number, text in texts.items()}
        lanes = []
        for lane in checked["lanes"]:
            if lane is None:
                lanes.append(Lane())
                continue
            epoch, place, offset = lane
            document = documents[DocumentNumber(epoch, place)]
            if offset >= document.tokens.numel():
                raise DataError(
                    f"the saved state is {offset} tokens into document {place} of epoch {epoch}, which has only "
                    f"{document.tokens.numel()}: the data of source {self._source.name!r} have changed"
                )
            lanes.append(Lane(document, offset))
        self._queue.seek(DocumentNumber(*checked["queue"]))
        self._lanes = lanes
        self.step = checked["step"]

    def _next_document(self) -> Document:
        """Fetch the next document that has tokens."""
        first_epoch = self.epoch
        while True:
            number, text = self._queue.take()
            tokens = document_tokens(self._tokenizer, text)
            if tokens.numel() > 0:
                return Document(number, tokens)
            # Two epochs on, the one in between was seen from its first document to its last.
            if self.epoch >= first_epoch + 2:
                raise DataError(
                    f"source {self._source.name!r} gives not one token in a whole epoch: all texts are empty"
                )


def _check_sizes(seq_len: int, global_batch_size: int, rank: int, world: int) -> None:
    for name, value in (("seq_len", seq_len), ("global_batch_size", global_batch_size), ("world", world)):
        if value < 1:
            raise DataError(f"{name} must be at least 1, not {value}")
    if not 0 <= rank < world:
        raise DataError(f"rank must be in 0..{world - 1} for world = {world}, not {rank}")
    if global_batch_size % world != 0:
        below = global_batch_size // world * world
        nearby = [size for size in (below, below + world) if size > 0]
        raise DataError(
            f"global_batch_size = {global_batch_size} cannot be divided among world = {world} ranks; "
            f"use global_batch_size = {' or '.join(map(str, nearby))}"
        )
