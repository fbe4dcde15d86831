"""Byte-level tokenizers in the form of Hugging Face's tokenizer.json, which transformers reads.

Called by `export_tokenizer` for the tokenizers that are not stored in this form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titan_data.tokenizers.byte_letters import bytes_of_letters

_POSSESSIVE = re.compile(r"(?:[+*?]|\{\d+(?:,\d*)?\})\+")

Ranks = Mapping[bytes, int]
"""Tokens and their ids; a pair of neighbors is merged if together they are a token, that of the lowest id first."""


@dataclass(frozen=True)
class ByteLevel:
    """A byte-level tokenizer.

    Attributes:
        ranks: Tokens and their ids, all 256 bytes among them.
        special: Special tokens and their ids.
        pattern: Regular expression of the pieces within which bytes are merged; None: a text is one piece.
        normalization: Unicode normalization of the text, such as `NFC`; None for none.
    """

    ranks: Ranks
    special: Mapping[str, int]
    pattern: str | None = None
    normalization: str | None = None


def can_be_written(pattern: str) -> bool:
    """Whether a split pattern means in tokenizer.json what it means to tiktoken.

    The library that reads tokenizer.json has another kind of regular expression, in which `{1,3}+` is not possessive
    and `$` is the end of any line.
    """
    return "$" not in pattern and _POSSESSIVE.search(pattern) is None


def tokenizer_json(tokens: ByteLevel, bos: str | None) -> dict[str, Any]:
    """Return the contents of a tokenizer.json that encodes as tiktoken does.

    Args:
        tokens: The tokenizer.
        bos: The special token that goes before a text, if any.
    """
    ranks, special, pattern = tokens.ranks, tokens.special, tokens.pattern
    letters = {byte[0]: letter for letter, byte in bytes_of_letters().items()}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for name, number in special.items()
        ],
        "normalizer": None if tokens.normalization is None else {"type": tokens.normalization},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*([split] if pattern else []), level]},
        "post_processor": None if bos is None else _bos_before_text(bos, special[bos]),
        "decoder": level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a piece that is a token needs no merges
            "vocab": {written(token): number for token, number in ranks.items()},
            "merges": [[written(left), written(right)] for left, right in merges_of(ranks)],
        },
    }


def _bos_before_text(bos: str, number: int) -> dict[str, Any]:
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, start, second],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def merges_of(ranks: Ranks) -> list[tuple[bytes, bytes]]:
    """Return the pairs of tokens that make a token, in the order in which they are merged."""
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
