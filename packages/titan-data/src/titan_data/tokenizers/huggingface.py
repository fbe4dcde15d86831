"""Hugging Face's `tokenizer.json`, through the `tokenizers` library (extra `titan-data[huggingface]`)."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from titan_data.errors import DataError
from titan_data.tokenizers._huggingface_text import text_only
from titan_data.tokenizers.base import replace_surrogates
from titan_data.tokenizers.markers import Markers, parse_config, token_name

# tokenizer.json does not say which special token is bos, eos or pad; tokenizer_config.json does. Without it, these
# names of well-known models are used.
_WELL_KNOWN = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>"),
    "eos_token": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
    "pad_token": ("<|finetune_right_pad_id|>", "<pad>"),
}


class HuggingFaceTokenizer:
    """A `tokenizer.json` file; bos, eos and pad are those named by `tokenizer_config.json` next to it.

    Args:
        data: Contents of tokenizer.json.
        config: Contents of tokenizer_config.json; None if there is none: then well-known names of special tokens are
            used.
        name: The file's name, for messages.
        markers: Which tokens stand before and after each document; what the files say if None.

    Raises:
        DataError: If `tokenizers` is not installed, or the contents are invalid.
    """

    def __init__(
        self,
        data: bytes,
        config: bytes | None = None,
        name: str = "tokenizer.json",
        markers: Markers | None = None,
    ) -> None:
        try:
            import tokenizers  # here: an optional extra
        except ImportError:
            raise DataError(f"{name} needs an extra: pip install 'titan-data[huggingface]'") from None
        self._data, self._config, self._name = data, config, name
        self._markers = markers = markers or Markers()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{name} is not a Hugging Face tokenizer, or is corrupt: {error}; download it again"
            ) from None
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._choose_markers(markers)
        known = {i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None}
        text = text_only(data, known, match_added_tokens=markers.match_added_tokens, name=name)
        self._encoder = tokenizers.Tokenizer.from_str(text)
        self._encoder.encode_special_tokens = True
        ends = json.dumps([self.bos_id, self.eos_id, self.pad_id]).encode()
        digest = hashlib.sha256((b"match" if markers.match_added_tokens else b"") + ends + data)
        self.fingerprint: str = f"huggingface/{digest.hexdigest()[:32]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self._config, self._name, self._markers)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; lone surrogates become U+FFFD, names of special and added tokens are ordinary text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn several texts into ids in the library's own threads."""
        texts = [replace_surrogates(text) for text in texts]
        # "Fast" leaves out the tokens' offsets in the text, which are not needed here.
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, without special tokens; ids outside the vocabulary are dropped."""
        markers = (self.bos_id, self.eos_id, self.pad_id)  # which the file may not call special
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in markers]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def _choose_markers(self, markers: Markers) -> None:
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        config = parse_config(self._config, self._name)

        def usual(kind: str) -> int | None:
            return next((special[token] for token in _WELL_KNOWN[kind] if token in special), None)

        def find(token: str) -> int | None:
            found: int | None = self._tokenizer.token_to_id(token)
            return found

        self.bos_id: int | None
        self.eos_id: int | None
        self.pad_id: int | None
        # With a config, what it does not name there is not.
        defaults = (None, None) if config is not None else (usual("bos_token"), usual("eos_token"))
        names = [token.content for _, token in sorted(added.items())]
        self.bos_id, self.eos_id = markers.resolve(find, config, defaults, names, self._name)
        if config is None:
            self.pad_id = usual("pad_token")
        else:
            pad = token_name(config.get("pad_token"))
            self.pad_id = None if pad is None else find(pad)
            if pad is not None and self.pad_id is None:
                raise DataError(f"tokenizer_config.json names {pad!r} as pad_token, but {self._name} has no such token")
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if self.pad_id is not None and unknown is not None and self.pad_id == self._tokenizer.token_to_id(unknown):
            self.pad_id = None  # unknown characters are text
