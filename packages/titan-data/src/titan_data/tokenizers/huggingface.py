"""Hugging Face's `tokenizer.json`, through the `tokenizers` library (extra `titan-data[huggingface]`)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from titan_data.errors import DataError
from titan_data.tokenizers.base import replace_surrogates

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

    Raises:
        DataError: If `tokenizers` is not installed, or the contents are invalid.
    """

    def __init__(self, data: bytes, config: bytes | None = None, name: str = "tokenizer.json") -> None:
        try:
            import tokenizers  # here: an optional extra
        except ImportError:
            raise DataError(f"{name} needs an extra: pip install 'titan-data[huggingface]'") from None
        self._data, self._config, self._name = data, config, name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{name} is not a Hugging Face tokenizer, or is corrupt: {error}; download it again"
            ) from None
        # Never truncate or pad, whatever was set when the file was saved.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Names of special tokens in a document are ordinary text.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        settings = _parse_config(config, name)
        self.bos_id, self.eos_id, self.pad_id = (self._special_id(kind, settings) for kind in _WELL_KNOWN)
        ends = json.dumps([self.bos_id, self.eos_id, self.pad_id]).encode()
        self.fingerprint: str = f"huggingface/{hashlib.sha256(ends + data).hexdigest()[:32]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self._config, self._name)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; lone surrogates become U+FFFD, names of special tokens are ordinary text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn several texts into ids in the library's own threads."""
        texts = [replace_surrogates(text) for text in texts]
        # "Fast" leaves out the tokens' offsets in the text, which are not needed here.
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, without special tokens; ids outside the vocabulary are dropped."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def _special_id(self, kind: str, config: Mapping[str, Any] | None) -> int | None:
        if config is None:
            return next((self._special[token] for token in _WELL_KNOWN[kind] if token in self._special), None)
        token = config.get(kind)
        if isinstance(token, Mapping):  # older files have the token with its settings
            token = token.get("content")
        if token is None:
            return None
        found: int | None = self._tokenizer.token_to_id(str(token))
        if found is None:
            raise DataError(f"tokenizer_config.json names {token!r} as {kind}, but {self._name} has no such token")
        return found


def _parse_config(config: bytes | None, name: str) -> Mapping[str, Any] | None:
    if config is None:
        return None
    try:
        parsed = json.loads(config)
    except ValueError as error:
        raise DataError(f"the tokenizer_config.json next to {name} is corrupt: {error}; download it again") from None
    if not isinstance(parsed, Mapping):
        raise DataError(f"the tokenizer_config.json next to {name} is not a JSON object; download it again")
    return parsed
