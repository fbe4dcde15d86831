"""From text to a document's ids, and runs of documents with their lengths at hand.

A place between two documents of a source is a cursor: a few integers, the first of which is the epoch.
"""

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.sources.base import Tokens
from titan_data.tokenizers.base import Ids, Tokenizer

Cursor = tuple[int, ...]
Encode = Callable[[Sequence[str]], list[npt.NDArray[np.int32]]]
"""Turns documents into ids as `encode_documents` does."""


def encode_document(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.int32]:
    """Turn a document into `[bos] + tokens + [eos]`, bos and eos left out where the tokenizer has none.

    Args:
        tokenizer: gives the ids.
        text: the document.

    Returns:
        int32 `[T]`; no tokens at all for a text without any: bos and eos alone would teach a model to say nothing.

    Raises:
        DataError: the tokenizer gave an id outside of its vocabulary (on a GPU that would be an illegal access).
    """
    return encode_documents(tokenizer, [text])[0]


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
    """Do the same for several documents at once, which some tokenizers do faster.

    Args:
        tokenizer: gives the ids.
        texts: the documents.

    Returns:
        For each document what `encode_document` returns.

    Raises:
        DataError: the tokenizer gave an id outside of its vocabulary.
    """
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [_document(ids, before, after, tokenizer.vocab_size) for ids in tokenizer.encode_batch(texts)]


def _document(ids: Ids, before: list[int], after: list[int], vocab_size: int) -> npt.NDArray[np.int32]:
    if len(ids) == 0:
        return np.empty(0, dtype=np.int32)
    if not isinstance(ids, np.ndarray):
        # By way of an array: a third of the time that numpy takes over a list.
        try:
            ids = np.frombuffer(array("q", ids), dtype=np.int64)
        except OverflowError:
            raise DataError(f"the tokenizer gave id {max(ids, key=abs)}, which no vocabulary holds") from None
    begin, end = len(before), len(before) + len(ids)
    low, high = min([int(ids.min()), *before, *after]), max([int(ids.max()), *before, *after])
    if low < 0 or high >= vocab_size:
        raise DataError(f"the tokenizer gave ids from {low} to {high}, but its vocab_size is {vocab_size}")
    tokens = np.empty(end + len(after), dtype=np.int32)
    tokens[:begin], tokens[begin:end], tokens[end:] = before, ids, after
    return tokens


class Block:
    """Consecutive documents of one epoch, those without tokens passed over.

    Args:
        lengths: int64 `[D]`, tokens of each document; may be zero.
        cursors: gives the place before document d; for d = D the place right after the last.
        tokens: gives the ids of document d.
        describe: says to people which document d is.
        after: the place where the next block begins: in the next epoch, where this one is over.

    Attributes:
        lengths: K of them, of the documents that have tokens.
        ends: K sums of the lengths, up to and with each. (Lists, as bisecting one is far quicker than an array.)
        total: tokens of all.
        passed: K + 1 counts of the documents without tokens that come before each, and in all.
        after: the place where the next block begins.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        cursors: Callable[[int], Cursor],
        tokens: Callable[[int], Tokens],
        describe: Callable[[int], str],
        after: Cursor,
    ) -> None:
        kept = np.flatnonzero(lengths)
        self._numbers: list[int] = kept.tolist()
        self._cursors = cursors
        self._tokens = tokens
        self._describe = describe
        self.lengths: list[int] = lengths[kept].tolist()
        self.ends: list[int] = lengths[kept].cumsum().tolist()
        self.total = self.ends[-1] if self.ends else 0
        self.passed: list[int] = [*(kept - np.arange(len(kept))).tolist(), len(lengths) - len(kept)]
        self.after = after

    def __len__(self) -> int:
        return len(self.lengths)

    def before(self, k: int) -> Cursor:
        """Give the place right before document k."""
        return self._cursors(self._numbers[k])

    def behind(self, k: int) -> Cursor:
        """Give the place right after document k, before any document without tokens that may follow it."""
        return self._cursors(self._numbers[k] + 1)

    def tokens(self, k: int) -> Tokens:
        """Give the ids of document k."""
        tokens = self._tokens(self._numbers[k])
        if tokens.shape != (self.lengths[k],):
            raise DataError(
                f"{self.describe(k)} has shape {tokens.shape}, but its source says {self.lengths[k]} tokens"
            )
        return tokens

    def describe(self, k: int) -> str:
        """Say to people which document k is."""
        return self._describe(self._numbers[k])
