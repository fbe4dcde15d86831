"""The run's tokenizer as files that transformers reads, for checkpoints that are exported to Hugging Face's format.

`assembly` writes them once, into the run's folder, so that every export has the tokenizer that the run was trained
with, whatever happens to the original files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from titan_data import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

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
_BOS, _EOS = "<bos>", "<eos>"


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return the entries of a `config.json` that say how text begins and ends."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def write_tokenizer_files(directory: Path, tokenizer: Tokenizer, path: str) -> None:
    """Write a tokenizer's files, each of them completely or not at all.

    Args:
        directory: Where to; it is created.
        tokenizer: The tokenizer.
        path: The setting `data.tokenizer` that it was loaded from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(tokenizer, path).items():
        staging = directory / f".{name}.{os.getpid()}"
        staging.write_bytes(content)
        staging.replace(directory / name)


def tokenizer_files(tokenizer: Tokenizer, path: str) -> dict[str, bytes]:
    """Return the contents of the files by name: the tokenizer, and where generation begins and ends.

    Files beside the tokenizer's own come as they are. A tokenizer of tiktoken ranks has no form that transformers reads
    without further settings: of it only the token ids are exported.

    Args:
        tokenizer: The tokenizer.
        path: The setting `data.tokenizer` that it was loaded from.
    """
    ids = {key: value for key, value in token_ids(tokenizer).items() if value is not None}
    files = {"generation_config.json": _json(ids)} if ids else {}
    match tokenizer:
        case ByteTokenizer():
            files |= _byte_tokenizer(tokenizer)
        case HuggingFaceTokenizer():
            file = _file(path, "tokenizer.json")
            text = json.loads(file.read_bytes())
            files |= {"tokenizer.json": file.read_bytes(), "tokenizer_config.json": _config(text, tokenizer)}
            files |= _beside(file)
        case SentencePieceTokenizer():
            file = _file(path, "tokenizer.model")
            files |= {"tokenizer.model": file.read_bytes(), "tokenizer_config.json": _json({"tokenizer_class": _LLAMA})}
            files |= _beside(file)
    return files


_LLAMA = "LlamaTokenizer"  # what reads SentencePiece models in transformers


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
    return _json({"tokenizer_class": "PreTrainedTokenizerFast", **tokens})


def _byte_tokenizer(tokenizer: ByteTokenizer) -> dict[str, bytes]:
    """Return `ByteTokenizer` as a byte-level BPE without merges, which also puts bos before a text."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    special = [
        {"id": number, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name, number in ((_BOS, tokenizer.bos_id), (_EOS, tokenizer.eos_id))
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    bos = {"SpecialToken": {"id": _BOS, "type_id": 0}}
    content = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, one],
            "pair": [bos, one, bos, two],
            "special_tokens": {_BOS: {"id": _BOS, "ids": [tokenizer.bos_id], "tokens": [_BOS]}},
        },
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": _json(content), "tokenizer_config.json": _json(settings)}


def _byte_characters() -> list[str]:
    """Return the character that byte-level tokenizers write each byte as (GPT-2, Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
