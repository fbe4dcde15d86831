"""From rows to tensors: the one place where labels are shifted.

`B` rows of this rank, `S` tokens per row.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titan_data.batching.packing import Row
from titan_data.errors import DataError

NOT_SCORED = -100
_CACHED_TOKENS = 1 << 15  # worked on at a time: the arrays in between then stay in the processor's cache

_Ids = npt.NDArray[np.int64]


class Batch(TypedDict):
    """One rank's rows of one global batch: int64 CPU tensors, new ones for each step.

    Attributes:
        tokens: `[B, S]` token ids.
        labels: `[B, S]` for each token the next token of its document, also where that one begins a later row; -100
            (not scored) at the last token of a document and on padding. Already shifted: the loss compares
            `logits[b, s]` with `labels[b, s]`.
        positions: `[B, S]` place of each token among those of its document in this row, so from 0 to S - 1: a document
            that goes on in another row begins there at 0 again, as it cannot see what went before.
        document_ids: `[B, S]` 0, 1, 2, … along a row: which tokens of the row belong to one document. Padding, always
            at the end of a row, is a document of its own.
        sources: for each of the B rows, the name of the source it came from; "" for a row that is all padding, as it
            stands at the very end of sources that end.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    sources: list[str]


def build_batch(
    rows: Sequence[tuple[str, Row]],
    seq_len: int,
    *,
    cross_document: bool,
    pad_id: int,
    vocab_size: int | None,
) -> Batch:
    """Build the tensors of a batch.

    Args:
        rows: for each of the B rows the name of its source and its pieces, at most S tokens in all.
        seq_len: S, tokens per row.
        cross_document: whether each row is one text, whatever documents it holds.
        pad_id: the token that fills rows up.
        vocab_size: ids must be below; None to let any id pass that is not negative.

    Returns:
        The batch; nothing in it shares memory with the documents.

    Raises:
        DataError: an id outside of the vocabulary; the message names the document.
    """
    shape = (len(rows), seq_len)
    whole = [np.empty(shape, dtype=np.int64) for _ in range(4)]
    at_once = max(1, _CACHED_TOKENS // seq_len)
    for begin in range(0, len(rows), at_once):
        some = rows[begin : begin + at_once]
        tokens, labels, positions, document_ids = (array[begin : begin + at_once].reshape(-1) for array in whole)
        pieces = _lay_out(some, seq_len, pad_id, tokens)
        _check_ids(tokens, some, seq_len, vocab_size)
        if cross_document:
            pieces = _join(some, seq_len, pieces)
        labels[:-1] = tokens[1:]
        labels[pieces.ends] = pieces.following
        for places in pieces.padding:
            labels[places] = NOT_SCORED
        sizes = np.array(pieces.sizes)
        # Tokens before each token's piece, taken off a count through all rows: where it stands in its piece.
        np.subtract(np.arange(len(tokens)), np.repeat(np.cumsum(sizes) - sizes, sizes), out=positions)
        document_ids[:] = np.repeat(np.array(pieces.numbers), sizes)
    return Batch(
        tokens=torch.from_numpy(whole[0]),
        labels=torch.from_numpy(whole[1]),
        positions=torch.from_numpy(whole[2]),
        document_ids=torch.from_numpy(whole[3]),
        sources=[name for name, _ in rows],
    )


class _Pieces(NamedTuple):
    """The pieces of some rows that are laid end to end.

    Attributes:
        sizes: tokens of each piece; padding is a piece too.
        numbers: of each along its row.
        ends: places of the last token of each piece that is no padding …
        following: … and their labels.
        padding: where it is.
    """

    sizes: list[int]
    numbers: list[int]
    ends: list[int]
    following: list[int]
    padding: list[slice]


def _lay_out(rows: Sequence[tuple[str, Row]], seq_len: int, pad_id: int, tokens: _Ids) -> _Pieces:
    """Copy the rows' tokens to where they belong, end to end, and say what lies where."""
    pieces = _Pieces([], [], [], [], [])
    at = 0
    for number_of_row, (_, row) in enumerate(rows, start=1):
        for number, (block, k, start, stop, goes_on) in enumerate(row.pieces):
            document = block.tokens(k)
            size = stop - start
            tokens[at : at + size] = document[start:stop]
            at += size
            pieces.sizes.append(size)
            pieces.numbers.append(number)
            pieces.ends.append(at - 1)
            pieces.following.append(int(document[stop]) if goes_on else NOT_SCORED)
        if at < (row_end := number_of_row * seq_len):
            tokens[at:row_end] = pad_id
            pieces.padding.append(slice(at, row_end))
            pieces.sizes.append(row_end - at)
            pieces.numbers.append(len(row.pieces))
            at = row_end
    return pieces


def _join(rows: Sequence[tuple[str, Row]], seq_len: int, apart: _Pieces) -> _Pieces:
    """Treat the documents of each row as one."""
    pieces = _Pieces([], [], [], [], apart.padding)
    count = 0
    for _, row in rows:
        count += len(row.pieces)
        if row.tokens > 0:
            pieces.sizes.append(row.tokens)
            pieces.numbers.append(0)
            pieces.ends.append(apart.ends[count - 1])
            pieces.following.append(apart.following[count - 1])
        if row.tokens < seq_len:
            pieces.sizes.append(seq_len - row.tokens)
            pieces.numbers.append(int(row.tokens > 0))
    return pieces


def _check_ids(tokens: _Ids, rows: Sequence[tuple[str, Row]], seq_len: int, vocab_size: int | None) -> None:
    """Refuse ids that no embedding has: on a GPU they would be an illegal access."""
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and (vocab_size is None or high < vocab_size):
        return
    bad = int(np.flatnonzero((tokens < 0) | (tokens >= (high + 1 if vocab_size is None else vocab_size)))[0])
    number, column = divmod(bad, seq_len)
    for block, k, start, stop, _ in rows[number][1].pieces:
        if column < stop - start:
            where = f"{block.describe(k)}, token {start + column}"
            break
        column -= stop - start
    else:
        where = "the padding"
    limit = "negative" if vocab_size is None else f"outside of the vocabulary of {vocab_size}"
    raise DataError(f"{where} is id {int(tokens[bad])}, {limit}: was it made with another tokenizer?")
