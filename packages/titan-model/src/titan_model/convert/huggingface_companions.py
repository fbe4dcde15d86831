"""Tokenizer, chat template, defaults of generation and token ids of a Hugging Face folder: read, and written again.

Called by `huggingface_files`. Nothing here interprets a tokenizer; files come out as they came in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_model.companions import Companions
from titan_model.convert.errors import shown
from titan_model.convert.folders import check_downloaded, read_json_object
from titan_model.convert.huggingface_config import config_from_huggingface

CONFIG, GENERATION = "config.json", "generation_config.json"
_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    GENERATION,
)
_TOKENS = ("bos", "eos", "pad")
_ENTRIES = (*(f"{name}_token_id" for name in (*_TOKENS, "unk", "sep", "cls", "mask")), "tokenizer_class")


def read_companions(directory: Path) -> Companions:
    """Read what a folder holds besides weights and the model's shape.

    Token ids are those of `config.json` or, where it has none, of the tokenizer.

    Args:
        directory: A model's folder, or one with a tokenizer only.

    Raises:
        WeightsError: If a file is a Git LFS pointer.
        ValueError: If a JSON file that token ids are taken from is invalid.
    """
    paths = sorted({path for pattern in _FILES for path in directory.glob(pattern) if path.is_file()})
    for path in paths:
        check_downloaded(path)
    files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    values = read_json_object(directory / CONFIG, "a model") if (directory / CONFIG).is_file() else {}
    entries = {key: values[key] for key in _ENTRIES if values.get(key) is not None}
    return Companions(entries={**_tokenizers_ids(directory), **entries}, files=files)


def config_with(config: Mapping[str, Any], companions: Companions, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a `config.json`, with token ids and further entries.

    Args:
        config: The entries that describe the model.
        companions: Where token ids come from.
        extra: Further entries, which take precedence over those of `companions`.

    Raises:
        ValueError: If `extra` contradicts what describes the model, or has an entry that would change it.
    """
    known = {**config, "dtype": config["torch_dtype"]}  # the same entry, as transformers 5 writes it
    contradicted = [
        f"{key} is {shown(value)}, but {shown(known[key])} in the model"
        for key, value in extra.items()
        if key not in _ENTRIES and key in known and known[key] != value
    ]
    if contradicted:
        raise ValueError(f"extra_config: {'; '.join(contradicted)}")
    values = {**config, **companions.entries, **extra}
    try:
        changed = config_from_huggingface(values) != config_from_huggingface(config)
    except ValueError as error:
        raise ValueError(f"extra_config: {error}") from None
    if changed:
        raise ValueError(f"extra_config: {', '.join(extra)}: an entry changes what the model computes: remove it")
    return values


def companion_files(companions: Companions, config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files to write beside the weights, by name.

    The token ids of `extra` replace those of `generation_config.json`, which transformers prefers to those of
    `config.json`. Without such a file one is made, if there are token ids.

    Args:
        companions: The files.
        config: The contents of the `config.json` that is written.
        extra: Its entries that the caller has given.
    """
    files = dict(companions.files)
    ids = {f"{name}_token_id" for name in _TOKENS}
    if GENERATION in files:
        given = {key: value for key, value in extra.items() if key in ids}
        values = {**json.loads(files[GENERATION]), **given} if given else None
    else:
        values = {key: config[key] for key in sorted(ids) if config.get(key) is not None}
    if values:
        files[GENERATION] = (json.dumps(values, indent=2) + "\n").encode()
    return files


def _tokenizers_ids(directory: Path) -> dict[str, int]:
    """Return the token ids that tokenizer_config.json names and tokenizer.json numbers."""
    settings, tokenizer = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if not (settings.is_file() and tokenizer.is_file()):
        return {}
    named, numbered = (read_json_object(path, "a tokenizer") for path in (settings, tokenizer))
    vocabulary = (numbered.get("model") or {}).get("vocab")
    numbers = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    numbers |= {token.get("content"): token.get("id") for token in numbered.get("added_tokens") or ()}
    found: dict[str, int] = {}
    for name in _TOKENS:
        token = named.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token  # older files add its settings
        if isinstance(token, str) and isinstance(numbers.get(token), int):
            found[f"{name}_token_id"] = numbers[token]
    return found
