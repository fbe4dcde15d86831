"""The `Tokenizer` protocol, and `ByteTokenizer`, which needs no vocabulary file."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
"""The ids of one text: a list, or an array `[T]` (faster, for libraries that need no Python integers)."""


class Tokenizer(Protocol):
    """Text to token ids and back. Any object with these members is a tokenizer; nothing has to be inherited.

    For `prepare` with workers a tokenizer must be picklable; those of this package are.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: every id is in `range(vocab_size)`."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id before each document, or None for nothing."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id after each document, or None for nothing."""
        ...

    @property
    def pad_id(self) -> int | None:
        """The padding id, or None if the vocabulary has none. Its labels are never scored."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they return equal ids for every text, bos, eos and pad included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without bos and eos.

        Text that looks like a special token ("<s>") is ordinary text: it never becomes the special id.

        Args:
            text: One complete document.

        Returns:
            The ids; `[]` for the empty text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Turn several texts into ids, in parallel threads where the library can.

        Args:
            texts: Complete documents.

        Returns:
            The ids that `encode` returns for each, in order, as lists or arrays.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, without special tokens.

        Args:
            ids: Token ids, which may include special ones.

        Returns:
            The text.
        """
        ...


class ByteTokenizer:
    """One token per UTF-8 byte: ids 0 to 255 are the bytes, 256 is bos, 257 is eos.

    For tests, first runs and byte models: nothing to download, nothing to train.

    Args:
        bos: Whether a bos stands before each document.
        eos: Whether an eos stands after each document.
    """

    vocab_size: Final[int] = 258
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: Final[None] = None
    fingerprint: str = "titan-data/bytes/1"

    def __init__(self, *, bos: bool = True, eos: bool = True) -> None:
        if not (bos and eos):
            self.bos_id, self.eos_id = 256 if bos else None, 257 if eos else None
            self.fingerprint = f"titan-data/bytes/1/{'bos' if bos else ''}/{'eos' if eos else ''}"

    def encode(self, text: str) -> list[int]:
        """Turn text into its UTF-8 bytes.

        Args:
            text: Any string. A lone surrogate (half of a character, which UTF-8 cannot encode) becomes "?", so that a
                model only sees valid UTF-8.

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
            ids: Token ids. Those that are not a byte (bos, eos, unused ids of a padded vocabulary) are dropped.

        Returns:
            The text; invalid UTF-8 becomes U+FFFD.
        """
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, as the tokenizer libraries require.

    Args:
        text: Any string.

    Returns:
        The text, with U+FFFD in place of each lone surrogate (half of a character).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
