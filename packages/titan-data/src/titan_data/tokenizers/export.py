"""`export_tokenizer`: a tokenizer as files that transformers reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from titan_data.tokenizers.base import ByteTokenizer, Tokenizer
from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer
from titan_data.tokenizers.tokenizer_json import ByteLevel, can_be_written, tokenizer_json

# What may lie beside a tokenizer's file and belongs to it.
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
_FAST = "PreTrainedTokenizerFast"  # what reads tokenizer.json in transformers
_LLAMA = "LlamaTokenizer"  # what reads SentencePiece models in transformers


def export_tokenizer(tokenizer: Tokenizer, directory: str | Path, *, loaded_from: str | Path) -> list[Path]:
    """Write a tokenizer's files, as transformers reads them: the tokenizer, and where generation begins and ends.

    Each file is written completely or not at all. Files beside the tokenizer's own come as they are. Of tiktoken ranks
    whose split pattern transformers would read in another way (GPT-2's, cl100k_base's), and of a tokenizer that is not
    one of titan-data's, only the token ids are written. (transformers reads a SentencePiece model in its own way in one
    point: it puts no space before a text that begins with one.)

    Args:
        tokenizer: The tokenizer.
        directory: Where to; it is created.
        loaded_from: The file or folder that `load_tokenizer` loaded it from, or "bytes".

    Returns:
        The files; whatever else lies in the directory is not of this tokenizer.

    Example:
        >>> import tempfile
        >>> files = export_tokenizer(ByteTokenizer(), tempfile.mkdtemp(), loaded_from="bytes")
        >>> [file.name for file in files]
        ['generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in _contents(tokenizer, str(loaded_from)).items():
        staging = directory / f".{name}.{os.getpid()}"
        staging.write_bytes(content)
        written.append(staging.replace(directory / name))
    return written


def _contents(tokenizer: Tokenizer, path: str) -> dict[str, bytes]:
    """Return the contents of the files by name."""
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    ids = {key: value for key, value in ends.items() if value is not None}
    files = {"generation_config.json": _json(ids)} if ids else {}
    match tokenizer:
        case ByteTokenizer():
            markers = {"<bos>": tokenizer.bos_id, "<eos>": tokenizer.eos_id}
            special = {name: number for name, number in markers.items() if number is not None}
            files |= _byte_level(ByteLevel({bytes([byte]): byte for byte in range(256)}, special), tokenizer)
        case TiktokenTokenizer():
            encoding = tokenizer.encoding
            if can_be_written(encoding.pattern):
                special = dict(tokenizer.special_tokens)
                tokens = ByteLevel(tokenizer.ranks(), special, encoding.pattern, encoding.normalization)
                files |= _byte_level(tokens, tokenizer)
        case HuggingFaceTokenizer():
            file = _file(path, "tokenizer.json")
            text = json.loads(file.read_bytes())
            files |= {"tokenizer.json": file.read_bytes(), "tokenizer_config.json": _config(text, tokenizer)}
            files |= _beside(file)
        case SentencePieceTokenizer():
            file = _file(path, "tokenizer.model")
            settings = {
                "tokenizer_class": _LLAMA,
                "add_bos_token": tokenizer.bos_id is not None,
                "add_eos_token": False,
            }
            files |= {"tokenizer.model": file.read_bytes(), "tokenizer_config.json": _json(settings)}
            files |= _beside(file)
    return files


def _file(path: str, name: str) -> Path:
    given = Path(path).expanduser()
    return given / name if given.is_dir() else given


def _beside(file: Path) -> dict[str, bytes]:
    return {name: (file.parent / name).read_bytes() for name in _BESIDE if (file.parent / name).is_file()}


def _config(tokenizer: dict[str, Any], known: Tokenizer) -> bytes:
    """Return a tokenizer_config.json for a tokenizer.json that has none beside it."""
    names = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or ()}
    special = {"bos_token": known.bos_id, "eos_token": known.eos_id, "pad_token": known.pad_id}
    tokens = {key: names[number] for key, number in special.items() if number in names}
    return _json({"tokenizer_class": _FAST, **tokens})


def _byte_level(tokens_of: ByteLevel, known: Tokenizer) -> dict[str, bytes]:
    """Return a byte-level tokenizer as tokenizer.json."""
    names = {number: name for name, number in tokens_of.special.items()}
    ends = {"bos_token": known.bos_id, "eos_token": known.eos_id, "pad_token": known.pad_id}
    tokens = {key: names[number] for key, number in ends.items() if number is not None}
    settings = {"tokenizer_class": _FAST, "clean_up_tokenization_spaces": False, **tokens}
    content = tokenizer_json(tokens_of, tokens.get("bos_token"))
    return {"tokenizer.json": _json(content), "tokenizer_config.json": _json(settings)}


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
