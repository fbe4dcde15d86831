"""Real tokenizers for the tests, each trained once per session."""

import functools
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from titan_data import Tokenizer
from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer
from titan_data.tokenizers.tiktoken_encodings import SPLIT_PATTERN
from titan_data.tokenizers.train import train_tokenizer

KINDS = ("bpe", "sentencepiece", "huggingface")
VOCAB_SIZE = {"bpe": 1000, "sentencepiece": 600, "huggingface": 602}


@functools.cache
def texts() -> tuple[str, ...]:
    """Some real text: Python's own sources."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:25]
    return tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)


@functools.cache
def trained(kind: str) -> bytes:
    """The contents of a trained tokenizer's file."""
    if kind == "huggingface":
        return train_huggingface(VOCAB_SIZE[kind], ["<s>", "</s>"]).to_str().encode()
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    return train_tokenizer(texts(), kind=kind, vocab_size=VOCAB_SIZE[kind])


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """A trained tokenizer."""
    make = {"bpe": TiktokenTokenizer, "sentencepiece": SentencePieceTokenizer, "huggingface": HuggingFaceTokenizer}
    return make[kind](trained(kind))


def train_huggingface(vocab_size: int, special_tokens: list[str]) -> Any:
    """Train byte-level BPE with Llama 3's split pattern the way that the `tokenizers` library's users do."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    model.train_from_iterator(texts(), trainer)
    return model
