"""From documents to rows: a lane holds one document at a time, and a row is a lane's next S tokens.

`B` rows of this rank, `S` tokens per row, `T` tokens of one document.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from titan_data.documents import DocumentNumber
from titan_data.errors import DataError
from titan_data.tokenizer import Tokenizer

NOT_SCORED = -100


class Batch(TypedDict):
    """One rank's rows of one global batch: int64 CPU tensors, new ones for each step.

    Attributes:
        tokens: `[B, S]` token ids.
        labels: `[B, S]` for each token the next token of its document, also where that one begins the lane's next
            row; -100 (not scored) at the last token of a document. Already shifted: the loss compares
            `logits[b, s]` with `labels[b, s]`.
        positions: `[B, S]` place of each token in its document, from 0 (bos). A document that goes on in a later row
            counts on, so a position may be larger than S.
        document_ids: `[B, S]` 0, 1, 2, … along a row: which tokens of the row belong to one document.
        sources: for each of the B rows, the name of the source it came from.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    sources: list[str]


class Document(NamedTuple):
    """A document as tokens (int32 `[T]`), bos and eos included, with its place in the queue."""

    number: DocumentNumber
    tokens: Tensor


class Lane(NamedTuple):
    """The document that a lane is reading and how many of its tokens are used; None where the next is to be fetched."""

    document: Document | None = None
    offset: int = 0


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a document (int32 `[T]`): its share of one row."""

    tokens: Tensor
    start: int
    stop: int


def document_tokens(tokenizer: Tokenizer, text: str) -> Tensor:
    """Turn a document into `[bos] + tokens + [eos]`, bos and eos left out where the tokenizer has none.

    Args:
        tokenizer: gives the ids.
        text: the document.

    Returns:
        int32 `[T]`; no tokens at all for a text without any: bos and eos alone would teach a model to say nothing.

    Raises:
        DataError: the tokenizer gave an id outside of its vocabulary (on a GPU that would be an illegal access).
    """
    ids = tokenizer.encode(text)
    if len(ids) == 0:
        return torch.empty(0, dtype=torch.int32)
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    # By way of an array: a quarter of the time that torch.tensor takes over a list.
    tokens = torch.frombuffer(array("i", [*before, *ids, *after]), dtype=torch.int32)
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= tokenizer.vocab_size:
        raise DataError(f"the tokenizer gave ids from {low} to {high}, but its vocab_size is {tokenizer.vocab_size}")
    return tokens


def fill_row(lane: Lane, seq_len: int, take: Callable[[], Document]) -> tuple[list[Piece], Lane]:
    """Take the next row off a lane.

    Args:
        lane: the lane before the row.
        seq_len: S, tokens per row.
        take: fetches the next document (one with at least one token). Called only when a token of it is needed, so
            that what a lane holds is never an already used-up document.

    Returns:
        The pieces of the row, S tokens in all, and the lane after it.
    """
    document, offset = lane
    pieces = []
    missing = seq_len
    while missing > 0:
        if document is None:
            document, offset = take(), 0
        stop = min(document.tokens.numel(), offset + missing)
        pieces.append(Piece(document.tokens, offset, stop))
        missing -= stop - offset
        offset = stop
        if stop == document.tokens.numel():
            document, offset = None, 0
    return pieces, Lane(document, offset)


def pack_rows(rows: Sequence[Sequence[Piece]], seq_len: int, source: str) -> Batch:
    """Build the tensors of a batch.

    Args:
        rows: for each of the B rows its pieces, S tokens in all.
        seq_len: S, tokens per row.
        source: name of the source of all rows.

    Returns:
        The batch; nothing in it shares memory with the documents.
    """
    count = len(rows) * seq_len
    tokens = torch.empty(count, dtype=torch.int64)
    labels = torch.full((count,), NOT_SCORED, dtype=torch.int64)
    positions = torch.empty(count, dtype=torch.int64)
    document_ids = torch.empty(count, dtype=torch.int64)
    begin = 0  # of the piece, in the rows laid end to end
    for row in rows:
        for number, (document, start, stop) in enumerate(row):
            end = begin + stop - start
            tokens[begin:end] = document[start:stop]
            following = document[start + 1 : stop + 1]  # one short where the piece ends its document
            labels[begin : begin + following.numel()] = following
            torch.arange(start, stop, out=positions[begin:end])
            document_ids[begin:end] = number
            begin = end
    shape = (len(rows), seq_len)
    return Batch(
        tokens=tokens.view(shape),
        labels=labels.view(shape),
        positions=positions.view(shape),
        document_ids=document_ids.view(shape),
        sources=[source] * len(rows),
    )
