"""What a tiktoken rank file does not say: how text is split, and which special tokens there are.

`find_encoding` recognizes the published rank files by their SHA-256. Called by `load_tokenizer`.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

# How Llama 3 splits text into the pieces in which bytes are then merged.
# Source: Meta's llama3 repository, llama/tokenizer.py.
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
SPECIAL_TOKENS: Final = 256  # of Llama 3; their ids follow the ranks: 128000 to 128255

# Source of the next three: tiktoken, tiktoken_ext/openai_public.py.
_GPT2_PATTERN: Final = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K_PATTERN: Final = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
)
_O200K_PATTERN: Final = "|".join(
    [
        _LETTERS % ("*", "+"),
        _LETTERS % ("+", "*"),
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Source: Qwen-7B, tokenization_qwen.py.
_QWEN_PATTERN: Final = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class TiktokenEncoding:
    """What belongs to a tiktoken rank file.

    Attributes:
        pattern: Regular expression of the pieces of text in which bytes are merged.
        special_tokens: Ids of the special tokens by name.
        bos: Name of the token before each document, if any.
        eos: Name of the token after each document, if any.
        pad: Name of the padding token, if any.
        normalization: Unicode normalization of the text, if any.
    """

    pattern: str
    special_tokens: Mapping[str, int] = field(repr=False)
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    normalization: Literal["NFC", "NFKC"] | None = None


def llama3_encoding(ranks: int) -> TiktokenEncoding:
    """Return Llama 3's split pattern and special tokens, for a file of so many ranks; `train_tokenizer` uses them."""
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = iter(range(SPECIAL_TOKENS))
    tokens = [
        f"<|{names[i]}|>" if i in names else f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(SPECIAL_TOKENS)
    ]
    # Llama 3.1 names the padding token, number 4, "<|finetune_right_pad_id|>".
    numbered = {token: ranks + i for i, token in enumerate(tokens)}
    return TiktokenEncoding(SPLIT_PATTERN, numbered, tokens[0], tokens[1], tokens[4])


def _gpt2(ranks: int) -> TiktokenEncoding:
    return TiktokenEncoding(_GPT2_PATTERN, {"<|endoftext|>": 50256}, eos="<|endoftext|>")


def _cl100k(ranks: int) -> TiktokenEncoding:
    names = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    special = {name: 100257 + i for i, name in enumerate(names)} | {"<|endofprompt|>": 100276}
    return TiktokenEncoding(_CL100K_PATTERN, special, eos="<|endoftext|>")


def _o200k(ranks: int) -> TiktokenEncoding:
    special = {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}
    return TiktokenEncoding(_O200K_PATTERN, special, eos="<|endoftext|>")


def _qwen(ranks: int) -> TiktokenEncoding:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
    special = {name: 151643 + i for i, name in enumerate(names)}
    return TiktokenEncoding(_QWEN_PATTERN, special, eos="<|endoftext|>", normalization="NFC")


ENCODINGS: Final[Mapping[str, Callable[[int], TiktokenEncoding]]] = {
    "gpt2": _gpt2,
    "cl100k_base": _cl100k,
    "o200k_base": _o200k,
    "llama3": llama3_encoding,
    "qwen": _qwen,
}
"""The known encodings by name: functions of the number of ranks."""

# SHA-256 of the published files: those of OpenAI from tiktoken's source, Llama 3's from its repositories, Qwen's from
# that of Qwen-7B.
_FILES: Final = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": "gpt2",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": "llama3",
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": "qwen",
}


def find_encoding(data: bytes) -> str | None:
    """Return the name of the encoding of a published rank file; None for another file."""
    return _FILES.get(hashlib.sha256(data).hexdigest())
