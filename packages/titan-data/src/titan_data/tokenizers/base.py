"""What titan-data asks of a tokenizer, and the one that needs no vocabulary file: bytes."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
"""The ids of one text: a list, or (quicker, where a library has no need of Python's own numbers) an array `[T]`."""


class Tokenizer(Protocol):
    """Text to token ids and back. Any object of this shape will do; nothing has to be inherited.

    One that is to be used by several processes (`prepare`, or a loader with workers) must be picklable; those of
    this package are.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id lies in `range(vocab_size)`, the special ones included."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id put before each document, or None to put nothing there."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id put after each document, or None to put nothing there."""
        ...

    @property
    def pad_id(self) -> int | None:
        """The id that fills rows up, or None where the vocabulary has none for it. Its labels are never scored."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they give equal ids for every text, bos, eos and pad included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without bos and eos.

        Text that looks like a special token ("<s>") is text like any other: it never becomes the special id.

        Args:
            text: one whole document.

        Returns:
            The ids; `[]` for the empty text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Turn several texts into ids, in parallel threads where the library can.

        Args:
            texts: whole documents.

        Returns:
            The ids that `encode` gives for each of them, in their order, as lists or as arrays.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text; special ids give no text.

        Args:
            ids: token ids, special ones allowed.

        Returns:
            The text.
        """
        ...


class ByteTokenizer:
    """One token per UTF-8 byte: ids 0 to 255 are the bytes, 256 is bos, 257 is eos.

    For tests, for first runs and for models of bytes: there is nothing to download and nothing to train.
    """

    vocab_size: Final[int] = 258
    bos_id: Final[int] = 256
    eos_id: Final[int] = 257
    pad_id: Final[None] = None
    fingerprint: Final[str] = "titan-data/bytes/1"

    def encode(self, text: str) -> list[int]:
        """Turn text into its UTF-8 bytes.

        Args:
            text: any string. A lone surrogate (half of a character, which UTF-8 cannot express) becomes "?", so
                that what a model sees is valid UTF-8 throughout.

        Returns:
            One id in 0..255 per byte.
        """
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn several texts into their UTF-8 bytes."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn bytes back into text.

        Args:
            ids: token ids. Those that are no byte (bos, eos, ids that pad a vocabulary) are dropped.

        Returns:
            The text; bytes that are not valid UTF-8 show as U+FFFD.
        """
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


def replace_surrogates(text: str) -> str:
    """Make text that UTF-8 can express, as the libraries behind tokenizers want it.

    Args:
        text: any string.

    Returns:
        The text; in place of each lone surrogate (half of a character) U+FFFD.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
