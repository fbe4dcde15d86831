"""Llama 3's tokenizer: byte-pair ranks in tiktoken's file format, a split pattern and 256 special tokens."""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.tokenizers.base import replace_surrogates

# How Llama 3 splits text into the pieces in which bytes are then merged.
# Source: Meta's llama3 repository, llama/tokenizer.py (the same pattern as in tiktoken's cl100k_base).
SPLIT_PATTERN: Final = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

SPECIAL_TOKENS: Final = 256  # their ids follow the ranks: 128000 to 128255 in Llama 3
_BOS, _EOS, _PAD = 0, 1, 4  # among the special tokens; Llama 3.1 names number 4 "<|finetune_right_pad_id|>"

# Longer texts are split as in Meta's reference, so that the ids are the same: every _MAX_CHARACTERS, and within runs of
# more than _MAX_RUN characters that are all whitespace or all not. tiktoken's regex engine panics (which no `except
# Exception` catches) on longer runs of spaces, and older versions are slow on other long runs.
_MAX_CHARACTERS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")
_SPACE = re.compile(r"\s")
_NOT_SPACE = re.compile(r"\S")

_PARALLEL_FROM = 20_000  # characters; below, threads cost more than they gain


class TiktokenTokenizer:
    """Byte-pair encoding through tiktoken, with Llama 3's split pattern and special tokens.

    Ids `0..R-1` are the ranks of the file (R = 128,000 in Llama 3's), `R..R+255` the special tokens.

    Args:
        data: Contents of the rank file: on each line a token in base64 and its rank.
        name: The file's name, for messages.

    Raises:
        DataError: If the contents are not a rank file, or corrupt.
    """

    def __init__(self, data: bytes, name: str = "tokenizer.model") -> None:
        import tiktoken  # here: keeps `import titan_data` fast

        ranks = parse_ranks(data, name)
        self._data, self._name = data, name
        self.special_tokens: dict[str, int] = {token: len(ranks) + i for i, token in enumerate(_special_token_names())}
        self._ranks = len(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.vocab_size: int = len(ranks) + SPECIAL_TOKENS
        self.bos_id: int = len(ranks) + _BOS
        self.eos_id: int = len(ranks) + _EOS
        self.pad_id: int = len(ranks) + _PAD
        digest = hashlib.sha256(SPLIT_PATTERN.encode())
        for token in ranks:  # in the order of their ranks
            digest.update(len(token).to_bytes(4, "little") + token)
        self.fingerprint: str = f"tiktoken/{digest.hexdigest()[:32]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self._name)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; lone surrogates become U+FFFD, names of special tokens are ordinary text."""
        if len(text) <= _MAX_RUN:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for piece in cut_long_text(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Turn several texts into ids, with one thread per core (tiktoken releases the GIL)."""
        if len(texts) < 2 or sum(map(len, texts)) < _PARALLEL_FROM:
            return [self._encode_to_array(text) for text in texts]
        with ThreadPoolExecutor(min(len(texts), os.cpu_count() or 1)) as threads:
            return list(threads.map(self._encode_to_array, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, without special tokens; invalid UTF-8 becomes U+FFFD."""
        return self._encoding.decode([int(i) for i in ids if 0 <= i < self._ranks], errors="replace")

    def _encode_to_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Do what `encode` does, without a Python list, which would take a sixth longer."""
        if len(text) <= _MAX_RUN:
            return self._to_numpy(text)
        return np.concatenate([self._to_numpy(piece) for piece in cut_long_text(text)])

    def _to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates; `encode_ordinary` replaces them by itself
            return self._encoding.encode_to_numpy(replace_surrogates(text), disallowed_special=())


def parse_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Read a rank file.

    tiktoken's own reader caches files by path, so it would not notice that one has changed.

    Args:
        data: Contents of the file.
        name: The file's name, for messages.

    Returns:
        The tokens in the order of their ranks, which count from 0.

    Raises:
        DataError: If a line is invalid, a rank is out of order, a token is repeated, or a byte has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise _corrupt(name, f"line {number} is not a token in base64 and its rank: {line[:60]!r}") from None
        if int(rank) != number - 1 or len(ranks) != number:
            raise _corrupt(name, f"line {number} must have a new token and rank {number - 1}, but is {line[:60]!r}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _corrupt(name, f"{len(missing)} of the 256 single bytes have no token (the first is {missing[0]})")
    return ranks


def cut_long_text(text: str) -> list[str]:
    """Split text where Meta's reference does.

    Args:
        text: A text of any length.

    Returns:
        Parts of at most 400,000 characters, with at most 25,000 whitespace or other characters in a row; concatenated
        they are the text.
    """
    pieces = []
    for start in range(0, len(text), _MAX_CHARACTERS):
        part = text[start : start + _MAX_CHARACTERS]
        cuts = _cuts_in_runs(part) if _may_have_long_run(part) else []
        for begin, end in zip([0, *cuts], [*cuts, len(part)], strict=True):
            pieces.append(part[begin:end])
    return pieces


def _may_have_long_run(part: str) -> bool:
    """Rule out long runs cheaply: one of more than `_MAX_RUN` characters spans two of the points checked here."""
    half = _MAX_RUN // 2
    for point in range(0, len(part) - half, half):
        other = _NOT_SPACE if part[point].isspace() else _SPACE
        if other.search(part, point, point + half + 1) is None:
            return True
    return False


def _cuts_in_runs(part: str) -> list[int]:
    return [cut for run in _RUN.finditer(part) for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)]


def _special_token_names() -> list[str]:
    """List Llama 3's special tokens in the order of their ids (source: Meta's llama3 repository)."""
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = iter(range(SPECIAL_TOKENS))
    return [
        f"<|{names[i]}|>" if i in names else f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(SPECIAL_TOKENS)
    ]


def _corrupt(name: str, what: str) -> DataError:
    return DataError(f"{name} is not a tiktoken rank file, or is corrupt: {what}; download it again")
