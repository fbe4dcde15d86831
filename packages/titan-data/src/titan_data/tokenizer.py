"""What the loader asks of a tokenizer, and the one that needs no vocabulary file: bytes."""

from collections.abc import Sequence
from typing import Final, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. Any object of this shape will do; nothing has to be inherited."""

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
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they give equal ids for every text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without bos and eos (the loader adds them).

        Args:
            text: one whole document.

        Returns:
            The ids; `[]` for the empty text.
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

    def decode(self, ids: Sequence[int]) -> str:
        """Turn bytes back into text.

        Args:
            ids: token ids. Those that are no byte (bos, eos, ids that pad a vocabulary) are dropped.

        Returns:
            The text; bytes that are not valid UTF-8 show as U+FFFD.
        """
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")
