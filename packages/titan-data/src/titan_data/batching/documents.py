"""Tokenized documents: `encode_documents` turns texts into ids, `Block` holds consecutive documents with their lengths.

Called by the feeds, which read blocks; the packers take tokens out of them.
"""

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.sources.base import Tokens
from titan_data.tokenizers.base import Ids, Tokenizer

Cursor = tuple[int, ...]
"""A point between two documents of a source's queue; the first integer is the epoch."""

Encode = Callable[[Sequence[str]], list[npt.NDArray[np.int32]]]
"""A function that turns texts into ids as `encode_documents` does."""


def encode_document(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int32]:
    """Tokenize a document to `[bos] + tokens + [eos]`, without bos or eos if the tokenizer has none.

    Args:
        tokenizer: Produces the ids.
        text: The document.

    Returns:
        int32 `[T]`; `[0]` (not bos and eos alone) for a text without tokens, so that no empty document is trained on.

    Raises:
        DataError: If an id is outside the tokenizer's vocabulary (on a GPU that would be an illegal memory access).
    """
    return encode_documents(tokenizer, [text])[0]


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
    """Tokenize several documents in one call, which some tokenizers do faster.

    Args:
        tokenizer: Produces the ids.
        texts: The documents.

    Returns:
        For each document what `encode_document` returns.

    Raises:
        DataError: If an id is outside the tokenizer's vocabulary.
    """
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [_document(ids, before, after, tokenizer.vocab_size) for ids in tokenizer.encode_batch(texts)]


def _document(ids: Ids, before: list[int], after: list[int], vocab_size: int) -> npt.NDArray[np.int32]:
    if len(ids) == 0:
        return np.empty(0, dtype=np.int32)
    if not isinstance(ids, np.ndarray):
        # Through array("q"): three times as fast as np.array(list).
        try:
            ids = np.frombuffer(array("q", ids), dtype=np.int64)
        except OverflowError:
            raise DataError(f"the tokenizer returned id {max(ids, key=abs)}, which does not fit into 64 bits") from None
    begin, end = len(before), len(before) + len(ids)
    low, high = min([int(ids.min()), *before, *after]), max([int(ids.max()), *before, *after])
    if low < 0 or high >= vocab_size:
        raise DataError(f"the tokenizer returned ids from {low} to {high}, but its vocab_size is {vocab_size}")
    tokens = np.empty(end + len(after), dtype=np.int32)
    tokens[:begin], tokens[begin:end], tokens[end:] = before, ids, after
    return tokens


class Block:
    """Consecutive documents of one epoch. Documents without tokens are left out and counted.

    Args:
        lengths: int64 `[D]`, tokens of each document; may be zero.
        cursors: Returns the cursor before document d; for d = D the cursor after the last document.
        tokens: Returns the ids of document d.
        describe: Returns a description of document d for messages.
        next_cursor: Where the next block begins: in the next epoch if this block ends its epoch.

    Attributes:
        lengths: Tokens of each of the K documents that have tokens.
        ends: K cumulative sums of the lengths. (Lists, because bisecting a list is far faster than an array.)
        total: Tokens of all documents.
        empty_before: K + 1 counts: documents without tokens before each of the K documents, and in the whole block.
        next_cursor: Where the next block begins.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        cursors: Callable[[int], Cursor],
        tokens: Callable[[int], Tokens],
        describe: Callable[[int], str],
        next_cursor: Cursor,
    ) -> None:
        kept = np.flatnonzero(lengths)
        self._numbers: list[int] = kept.tolist()
        self._cursors = cursors
        self._tokens = tokens
        self._describe = describe
        self.lengths: list[int] = lengths[kept].tolist()
        self.ends: list[int] = lengths[kept].cumsum().tolist()
        self.total = self.ends[-1] if self.ends else 0
        self.empty_before: list[int] = [*(kept - np.arange(len(kept))).tolist(), len(lengths) - len(kept)]
        self.next_cursor = next_cursor

    def __len__(self) -> int:
        return len(self.lengths)

    def cursor_before(self, k: int) -> Cursor:
        """Return the cursor right before document k."""
        return self._cursors(self._numbers[k])

    def cursor_after(self, k: int) -> Cursor:
        """Return the cursor right after document k, before any documents without tokens that follow it."""
        return self._cursors(self._numbers[k] + 1)

    def tokens(self, k: int) -> Tokens:
        """Return the ids of document k.

        Raises:
            DataError: If their number is not the length that the source reported.
        """
        tokens = self._tokens(self._numbers[k])
        if tokens.shape != (self.lengths[k],):
            raise DataError(
                f"{self.describe(k)} has shape {tokens.shape}, but its source reports {self.lengths[k]} tokens"
            )
        return tokens

    def describe(self, k: int) -> str:
        """Describe document k for messages."""
        return self._describe(self._numbers[k])
