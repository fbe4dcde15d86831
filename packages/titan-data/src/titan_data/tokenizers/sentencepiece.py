"""SentencePiece models, such as Llama 2's `tokenizer.model`."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from titan_data.errors import DataError
from titan_data.tokenizers._sentencepiece_proto import as_control_pieces, top_level_fields, user_defined_pieces
from titan_data.tokenizers.base import replace_surrogates
from titan_data.tokenizers.markers import Markers, is_text, parse_config

# The library's time grows faster than linearly: it took minutes for 50 MB. So long texts are split before words.
_CUT_FROM = 20_000  # characters after which the next cut is made
_BORDER = re.compile("(?<=[0-9A-Za-z]) (?=[0-9A-Za-z])")


class SentencePieceTokenizer:
    """A SentencePiece model; bos, eos and pad are those of the model.

    Decoding returns the original text if the model's normalization changes nothing (as in Llama 2), except for U+2581,
    which SentencePiece uses for spaces.

    Args:
        data: Contents of the model file.
        name: The file's name, for messages.
        config: Contents of the tokenizer_config.json next to it, or None.
        markers: Which tokens stand before and after each document; what the files say if None.

    Raises:
        DataError: If the contents are not a SentencePiece model, or corrupt.
    """

    def __init__(
        self,
        data: bytes,
        name: str = "tokenizer.model",
        config: bytes | None = None,
        markers: Markers | None = None,
    ) -> None:
        import sentencepiece  # here: keeps `import titan_data` fast

        self._data, self._name, self._config, self._markers = data, name, config, markers
        markers = markers or Markers()
        missing = {1: "pieces", 2: "trainer settings", 3: "normalizer settings"}
        for field in top_level_fields(data):
            missing.pop(field, None)
        if missing:
            # The library accepts a file that is truncated between two of these.
            raise _corrupt(name, f"it has no {' and no '.join(missing.values())}")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, OSError) as error:
            raise _corrupt(name, str(error)) from None
        self.vocab_size: int = self._processor.vocab_size()
        processor = self._processor
        self._user_defined = user_defined_pieces(data)
        usual = (_id_or_none(processor.bos_id()), _id_or_none(processor.eos_id()))
        self.bos_id: int | None
        self.eos_id: int | None
        self.bos_id, self.eos_id = markers.resolve(
            self._find, parse_config(config, name), usual, self._special_pieces(), name
        )
        self.pad_id: int | None = _id_or_none(processor.pad_id())
        # User-defined pieces are found in any text; control pieces are not.
        hidden = {i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None}
        if not markers.match_added_tokens:
            hidden |= {i for i in self._user_defined if _is_marker(processor.id_to_piece(i))}
        if hidden := {i for i in hidden if not processor.is_control(i)}:
            processor.load_from_serialized_proto(as_control_pieces(data, hidden))
        self._may_cut = _pieces_begin_words(self._processor)
        more = b"" if (self.bos_id, self.eos_id) == usual else json.dumps([self.bos_id, self.eos_id]).encode()
        more += b"match" if markers.match_added_tokens else b""
        self.fingerprint: str = f"sentencepiece/{hashlib.sha256(data + more).hexdigest()[:32]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self._name, self._config, self._markers)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; lone surrogates become U+FFFD, names of control tokens are ordinary text."""
        text = replace_surrogates(text)
        if self._may_cut and len(text) > _CUT_FROM:
            return [i for part in self._processor.encode(_cut(text), num_threads=1) for i in part]
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn several texts into ids, with one thread per core."""
        parts = [_cut(replace_surrogates(text)) if self._may_cut else [replace_surrogates(text)] for text in texts]
        flat = [part for text in parts for part in text]
        encoded = iter(self._processor.encode(flat, num_threads=max(1, min(len(flat), os.cpu_count() or 1))))
        return [[i for _ in text for i in next(encoded)] for text in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, without control tokens; ids outside the vocabulary are dropped."""
        text: str = self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])
        return text

    def _special_pieces(self) -> list[str]:
        """List the names that bos and eos may have."""
        processor = self._processor
        found = [i for i in range(processor.vocab_size()) if processor.is_control(i) or i in self._user_defined]
        return [processor.id_to_piece(i) for i in found]

    def _find(self, token: str) -> int | None:
        found: int = self._processor.piece_to_id(token)
        known = self._processor.id_to_piece(found) == token and not self._processor.is_unknown(found)
        return found if known and (self._processor.is_control(found) or found in self._user_defined) else None


def _is_marker(piece: str) -> bool:
    """Whether a user-defined piece is a name, such as <|user|>, rather than characters of text."""
    return len(piece) > 1 and not is_text(piece)


def _pieces_begin_words(processor: Any) -> bool:
    """Whether a text can be split before words without changing its ids, if the space at each split is left out.

    It can if no piece continues beyond a space (U+2581), and if the library adds a space before each text.
    """
    pieces = processor.id_to_piece(list(range(processor.vocab_size())))
    inside = any("\u2581" in piece.lstrip("\u2581") for piece in pieces)
    return not inside and processor.encode("a b") == processor.encode("a") + processor.encode("b")


def _cut(text: str) -> list[str]:
    parts, start = [], 0
    while len(text) - start > _CUT_FROM and (border := _BORDER.search(text, start + _CUT_FROM)):
        parts.append(text[start : border.start()])
        start = border.end()
    return [*parts, text[start:]]


def _id_or_none(value: int) -> int | None:
    return value if value >= 0 else None


def _corrupt(name: str, what: str) -> DataError:
    return DataError(f"{name} is not a SentencePiece model, or is corrupt: {what}; download it again")
