"""Byte-pair ranks in tiktoken's file format, as of Llama 3, with a split pattern and special tokens."""

import base64
import binascii
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.tokenizers.base import replace_surrogates
from titan_data.tokenizers.markers import Markers, parse_config
from titan_data.tokenizers.tiktoken_encodings import ENCODINGS, TiktokenEncoding, find_encoding, llama3_encoding

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
    """Byte-pair encoding through tiktoken.

    Ids `0..R-1` are the ranks of the file (R = 128,000 in Llama 3's), special tokens follow.

    Args:
        data: Contents of the rank file: on each line a token in base64 and its rank.
        name: The file's name, for messages.
        config: Contents of the tokenizer_config.json next to it, or None.
        markers: Which tokens stand before and after each document; what the files say if None.
        encoding: Split pattern and special tokens, which the file does not say; if None those of Llama 3, or of the
            published file that it is.

    Raises:
        DataError: If the contents are not a rank file, or corrupt.
    """

    def __init__(
        self,
        data: bytes,
        name: str = "tokenizer.model",
        config: bytes | None = None,
        markers: Markers | None = None,
        encoding: TiktokenEncoding | None = None,
    ) -> None:
        import tiktoken  # here: keeps `import titan_data` fast

        ranks = parse_ranks(data, name)
        self._arguments = (data, name, config, markers, encoding)
        if encoding is None:
            encoding = ENCODINGS[find_encoding(data) or "llama3"](len(ranks))
        self.encoding = encoding
        self.special_tokens: dict[str, int] = dict(encoding.special_tokens)
        _check_special_tokens(self.special_tokens, len(ranks), name)
        self._ranks = len(ranks)
        self._normalization = encoding.normalization
        self._encoding = tiktoken.Encoding(
            name, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.vocab_size: int = max([len(ranks) - 1, *self.special_tokens.values()]) + 1
        self.bos_id: int | None
        self.eos_id: int | None
        self.pad_id: int | None
        usual_bos, usual_eos, self.pad_id = (
            None if token is None else self.special_tokens[token]
            for token in (encoding.bos, encoding.eos, encoding.pad)
        )
        self.bos_id, self.eos_id = (markers or Markers()).resolve(
            self.special_tokens.get, parse_config(config, name), (usual_bos, usual_eos), self.special_tokens, name
        )
        digest = hashlib.sha256(encoding.pattern.encode())
        for token in ranks:  # in the order of their ranks
            digest.update(len(token).to_bytes(4, "little") + token)
        if (self.bos_id, self.eos_id) != (usual_bos, usual_eos):
            digest.update(json.dumps([self.bos_id, self.eos_id]).encode())
        if encoding != llama3_encoding(len(ranks)):
            digest.update(json.dumps([*self.special_tokens.items(), encoding.pad, encoding.normalization]).encode())
        self.fingerprint: str = f"tiktoken/{digest.hexdigest()[:32]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def ranks(self) -> dict[bytes, int]:
        """Return the tokens that are not special, and their ids, in the order of these."""
        data, name, *_ = self._arguments
        return parse_ranks(data, name)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; lone surrogates become U+FFFD, names of special tokens are ordinary text."""
        text = self._normalize(text)
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
        text = self._normalize(text)
        if len(text) <= _MAX_RUN:
            return self._to_numpy(text)
        return np.concatenate([self._to_numpy(piece) for piece in cut_long_text(text)])

    def _normalize(self, text: str) -> str:
        return text if self._normalization is None else unicodedata.normalize(self._normalization, text)

    def _to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates; `encode_ordinary` replaces them by itself
            return self._encoding.encode_to_numpy(replace_surrogates(text), disallowed_special=())


def _check_special_tokens(special_tokens: Mapping[str, int], ranks: int, name: str) -> None:
    if wrong := [token for token, i in special_tokens.items() if i < ranks]:
        raise DataError(
            f"{name} has {ranks} ranks, and special token {wrong[0]!r} the id {special_tokens[wrong[0]]} of one of "
            "them: the file is of another encoding"
        )


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


def _corrupt(name: str, what: str) -> DataError:
    return DataError(f"{name} is not a tiktoken rank file, or is corrupt: {what}; download it again")
