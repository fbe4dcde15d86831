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

# How Llama 3 cuts text into the pieces that are then merged, each by itself.
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

SPECIAL_TOKENS: Final = 256  # they follow the ranks: 128000 to 128255 in Llama 3
_BOS, _EOS, _PAD = 0, 1, 4  # among the special tokens; Llama 3.1 names number 4 "<|finetune_right_pad_id|>"

# Longer texts are cut as Meta's reference does, so that the ids are the same: every so many characters, and where that
# many characters in a row are all white space or all not. tiktoken's regex engine gives up (with a panic, which no
# `except Exception` catches) on longer runs of spaces, and older versions are slow on other long runs.
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
        data: contents of the rank file: on each line a token in base64 and its rank.
        name: of the file, for messages.

    Raises:
        DataError: the contents are no rank file, or damaged.
    """

    def __init__(self, data: bytes, name: str = "tokenizer.model") -> None:
        import tiktoken  # late: `import titan_data` stays light

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
        """Turn text into ids; lone surrogates become U+FFFD, and names of special tokens are ordinary text."""
        if len(text) <= _MAX_RUN:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for piece in cut_long_text(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Turn several texts into ids in as many threads as there are cores (tiktoken works without the GIL)."""
        if len(texts) < 2 or sum(map(len, texts)) < _PARALLEL_FROM:
            return [self._encode_to_array(text) for text in texts]
        with ThreadPoolExecutor(min(len(texts), os.cpu_count() or 1)) as threads:
            return list(threads.map(self._encode_to_array, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text; bytes that are not valid UTF-8 show as U+FFFD, special ids give no text."""
        return self._encoding.decode([int(i) for i in ids if 0 <= i < self._ranks], errors="replace")

    def _encode_to_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Do what `encode` does, without a Python list: making one costs a sixth of what the encoding itself does."""
        if len(text) <= _MAX_RUN:
            return self._to_numpy(text)
        return np.concatenate([self._to_numpy(piece) for piece in cut_long_text(text)])

    def _to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # `encode_ordinary` sees to it by itself
            return self._encoding.encode_to_numpy(replace_surrogates(text), disallowed_special=())


def parse_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Read a rank file.

    tiktoken's own reader keeps a copy of each file by its path, so it would not see that one has changed.

    Args:
        data: contents of the file.
        name: of the file, for messages.

    Returns:
        The tokens in the order of their ranks, which count from 0.

    Raises:
        DataError: a line that is none, a rank out of order, a token twice, or a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise _damaged(name, f"line {number} is not a token in base64 and its rank: {line[:60]!r}") from None
        if int(rank) != number - 1 or len(ranks) != number:
            raise _damaged(name, f"line {number} should have a new token and rank {number - 1}, but is {line[:60]!r}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _damaged(name, f"{len(missing)} of the 256 single bytes have no token (the first is {missing[0]})")
    return ranks


def cut_long_text(text: str) -> list[str]:
    """Cut text where Meta's reference does.

    Args:
        text: of any length.

    Returns:
        Pieces of at most 400,000 characters, with at most 25,000 white-space or other characters in a row; together
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
    """Tell cheaply that most texts have no long run: one of more than `_MAX_RUN` spans two of these checkpoints."""
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


def _damaged(name: str, what: str) -> DataError:
    return DataError(f"{name} is no tiktoken rank file, or is damaged: {what}; fetch it again")
