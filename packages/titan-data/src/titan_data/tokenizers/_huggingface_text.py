"""A tokenizer.json for text only: the same ids, but no text can become one of its special or added tokens.

`encode_special_tokens` of the `tokenizers` library is not enough: it knows only tokens that the file calls special, and
many a model's own vocabulary contains their names (as in Unigram, WordLevel, and BPE with `ignore_merges`), so that the
model itself finds them in a text. Here the names are replaced by ones that no text contains.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from titan_data.errors import DataError
from titan_data.tokenizers.byte_letters import bytes_of_letters
from titan_data.tokenizers.markers import is_text

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def text_only(data: bytes, markers: Collection[int], *, match_added_tokens: bool, name: str) -> str:
    """Return the tokenizer.json of a tokenizer for text.

    Args:
        data: Contents of the tokenizer.json.
        markers: The ids of bos, eos and pad.
        match_added_tokens: Whether added tokens that are not special are matched in text.
        name: The file's name, for messages.

    Raises:
        DataError: If unknown characters would become a marker.
    """
    settings = json.loads(data)
    model, added = settings["model"], settings.get("added_tokens") or []
    # Longer than any name, and different in each file: no text contains it.
    prefix = f"\U0010fffe{hashlib.sha256(data).hexdigest()}/"
    hidden: dict[str, str] = {}
    for token in added:
        asked = match_added_tokens and not token["special"]
        if token["id"] in markers or not (asked or (is_text(token["content"]) and not token["special"])):
            hidden[token["content"]] = f"{prefix}{token['id']}"
            token["content"], token["special"] = hidden[token["content"]], True
    for content, i in _vocabulary(model):
        if i in markers:
            hidden.setdefault(content, f"{prefix}{i}")
    _check_unknown(model, markers, name)
    _rename(model, hidden)
    settings["post_processor"] = None  # it only adds special tokens, by their names
    settings["truncation"] = settings["padding"] = None
    return json.dumps(settings)


def _vocabulary(model: dict[str, Any]) -> list[tuple[str, int]]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    return [(content, i) for i, (content, _) in enumerate(vocabulary)]


def _rename(model: dict[str, Any], hidden: dict[str, str]) -> None:
    """Replace names in a model's vocabulary, and drop the merges that would make them."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(content, content): i for content, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(content, content), score] for content, score in model["vocab"]]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            merge
            for merge, pair in zip(model["merges"], pairs, strict=True)
            if not hidden.keys() & {*pair, pair[0] + pair[1][prefix:]}
        ]
    if "dropout" in model:
        model["dropout"] = None  # which would make the ids random


def _check_unknown(model: dict[str, Any], markers: Collection[int], name: str) -> None:
    """Check that what the vocabulary does not have becomes no marker."""
    vocabulary = dict(_vocabulary(model))
    unknown = model.get("unk_id") if "unk_id" in model else vocabulary.get(str(model.get("unk_token")))
    if unknown is None or unknown not in markers:
        return
    if model.get("byte_fallback") and all(byte in vocabulary for byte in _BYTES):
        return  # nothing is unknown
    if model.get("type") == "BPE" and not model.get("byte_fallback") and _has_all_byte_letters(vocabulary):
        model["unk_token"] = None
        return
    raise DataError(
        f"{name}: unknown characters would become token {unknown}, which marks a document's beginning or end: choose "
        "another bos or eos"
    )


def _has_all_byte_letters(vocabulary: dict[str, int]) -> bool:
    """Whether there is a token for each byte, in the letters of byte-level BPE."""
    return all(letter in vocabulary for letter in bytes_of_letters())
