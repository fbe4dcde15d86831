"""From packed sequences to the tensors of a batch. Labels are shifted here and nowhere else.

Called by the batch reader with this rank's sequences. Shapes: `B` sequences of this rank, `S` tokens per sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titan_data.batching.packing import PackedSequence
from titan_data.errors import DataError

NOT_SCORED = -100
_CACHED_TOKENS = 1 << 15  # tokens processed at a time: the intermediate arrays then stay in the processor's cache

_Ids = npt.NDArray[np.int64]


class Batch(TypedDict):
    """This rank's sequences of one global batch: int64 CPU tensors, new ones for each step.

    Attributes:
        tokens: `[B, S]` token ids.
        labels: `[B, S]` for each token the next token of its document, also if that one begins a later sequence; -100
            (not scored) at the last token of a document and on padding. Already shifted: the loss compares
            `logits[b, s]` with `labels[b, s]`.
        positions: `[B, S]` index of each token within its document and sequence, from 0 to S - 1. A document that
            continues in another sequence restarts there at 0, as it cannot attend to what came before.
        document_ids: `[B, S]` 0, 1, 2, … along a sequence: which of its tokens belong to one document. Padding, always
            at the end of a sequence, counts as one more document.
        sources: For each of the B sequences, the name of its source; "" for a sequence of padding only, as in the last
            batch of sources that end.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    sources: list[str]


def build_batch(
    sequences: Sequence[tuple[str, PackedSequence]],
    seq_len: int,
    *,
    cross_document: bool,
    pad_id: int,
    vocab_size: int | None,
) -> Batch:
    """Build the tensors of a batch.

    Args:
        sequences: For each of the B sequences the name of its source and its pieces, at most S tokens in all.
        seq_len: S, tokens per sequence.
        cross_document: Whether each sequence is one text, whatever documents it holds.
        pad_id: The padding token.
        vocab_size: Ids must be below it; None to accept any id that is not negative.

    Returns:
        The batch; it shares no memory with the documents.

    Raises:
        DataError: If an id is outside the vocabulary; the message names the document.
    """
    shape = (len(sequences), seq_len)
    full = [np.empty(shape, dtype=np.int64) for _ in range(4)]
    at_once = max(1, _CACHED_TOKENS // seq_len)
    for begin in range(0, len(sequences), at_once):
        some = sequences[begin : begin + at_once]
        tokens, labels, positions, document_ids = (array[begin : begin + at_once].reshape(-1) for array in full)
        pieces = _copy_tokens(some, seq_len, pad_id, tokens)
        _check_ids(tokens, some, seq_len, vocab_size)
        if cross_document:
            pieces = _merge_documents(some, seq_len, pieces)
        labels[:-1] = tokens[1:]
        labels[pieces.ends] = pieces.following
        for padding in pieces.padding:
            labels[padding] = NOT_SCORED
        sizes = np.array(pieces.sizes)
        # The index of each token over all sequences, less the number of tokens before its piece.
        np.subtract(np.arange(len(tokens)), np.repeat(np.cumsum(sizes) - sizes, sizes), out=positions)
        document_ids[:] = np.repeat(np.array(pieces.numbers), sizes)
    return Batch(
        tokens=torch.from_numpy(full[0]),
        labels=torch.from_numpy(full[1]),
        positions=torch.from_numpy(full[2]),
        document_ids=torch.from_numpy(full[3]),
        sources=[name for name, _ in sequences],
    )


class _Pieces(NamedTuple):
    """The pieces of several sequences laid end to end, as flat lists for numpy.

    Attributes:
        sizes: Tokens of each piece; padding is a piece too.
        numbers: Number of each piece in its sequence.
        ends: Index of the last token of each piece that is not padding …
        following: … and the label of that token.
        padding: Where padding is.
    """

    sizes: list[int]
    numbers: list[int]
    ends: list[int]
    following: list[int]
    padding: list[slice]


def _copy_tokens(sequences: Sequence[tuple[str, PackedSequence]], seq_len: int, pad_id: int, tokens: _Ids) -> _Pieces:
    """Copy the sequences' tokens into a flat array, with padding, and list the pieces."""
    pieces = _Pieces([], [], [], [], [])
    at = 0
    for count, (_, sequence) in enumerate(sequences, start=1):
        for number, (block, k, start, stop, continues) in enumerate(sequence.pieces):
            document = block.tokens(k)
            size = stop - start
            tokens[at : at + size] = document[start:stop]
            at += size
            pieces.sizes.append(size)
            pieces.numbers.append(number)
            pieces.ends.append(at - 1)
            pieces.following.append(int(document[stop]) if continues else NOT_SCORED)
        if at < (sequence_end := count * seq_len):
            tokens[at:sequence_end] = pad_id
            pieces.padding.append(slice(at, sequence_end))
            pieces.sizes.append(sequence_end - at)
            pieces.numbers.append(len(sequence.pieces))
            at = sequence_end
    return pieces


def _merge_documents(sequences: Sequence[tuple[str, PackedSequence]], seq_len: int, separate: _Pieces) -> _Pieces:
    """Treat the documents of each sequence as one."""
    pieces = _Pieces([], [], [], [], separate.padding)
    count = 0
    for _, sequence in sequences:
        count += len(sequence.pieces)
        if sequence.tokens > 0:
            pieces.sizes.append(sequence.tokens)
            pieces.numbers.append(0)
            pieces.ends.append(separate.ends[count - 1])
            pieces.following.append(separate.following[count - 1])
        if sequence.tokens < seq_len:
            pieces.sizes.append(seq_len - sequence.tokens)
            pieces.numbers.append(int(sequence.tokens > 0))
    return pieces


def _check_ids(
    tokens: _Ids, sequences: Sequence[tuple[str, PackedSequence]], seq_len: int, vocab_size: int | None
) -> None:
    """Reject ids outside the embedding: on a GPU they would be an illegal memory access."""
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and (vocab_size is None or high < vocab_size):
        return
    bad = int(np.flatnonzero((tokens < 0) | (tokens >= (high + 1 if vocab_size is None else vocab_size)))[0])
    number, column = divmod(bad, seq_len)
    for block, k, start, stop, _ in sequences[number][1].pieces:
        if column < stop - start:
            where = f"{block.describe(k)}, token {start + column}"
            break
        column -= stop - start
    else:
        where = "the padding"
    limit = "negative" if vocab_size is None else f"outside the vocabulary of {vocab_size}"
    raise DataError(f"{where} has id {int(tokens[bad])}, {limit}: was it made with another tokenizer?")
