"""What a model folder is, if it is not one: a Hub id, a file, a LoRA adapter, a file that Git LFS did not download.

Called by the loaders before they read anything.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from titan_model.convert.errors import WeightsError

_ADAPTER = "adapter_config.json"
_LFS = b"version https://git-lfs.github.com/spec/"
_HUB_ID = re.compile(r"(?:hf://|https?://(?:www\.)?huggingface\.co/)?([\w.-]+/[\w.-]+?)/?")


def open_folder(directory: str | os.PathLike[str]) -> Path:
    """Return a folder that holds a model.

    Args:
        directory: Its path.

    Raises:
        FileNotFoundError: If it is not there; the message says how to download it if it is the id of a model.
        WeightsError: If it is a file, or holds a LoRA adapter.
    """
    path, text = Path(directory), os.fspath(directory)
    if path.is_file():
        raise WeightsError(f"{path} is a file: give the folder that holds the model's config and weights")
    if not path.is_dir():
        if name := _HUB_ID.fullmatch(text):
            raise FileNotFoundError(
                f"{text}: no such folder. If it is a model of the Hugging Face Hub, download it first: "
                f"`huggingface_hub.snapshot_download({name[1]!r})` returns its folder"
            )
        raise FileNotFoundError(f"{path}: no such folder")
    if (path / _ADAPTER).is_file() and not any(path.glob("model*.safetensors*")):
        base = read_json_object(path / _ADAPTER, "a LoRA adapter").get("base_model_name_or_path")
        raise WeightsError(
            f"{path} holds an adapter ({_ADAPTER}) of the model {base!r}, not a model: merge the adapter into that "
            "model first (peft: `merge_and_unload`, then `save_pretrained`)"
        )
    return path


def check_downloaded(path: Path) -> None:
    """Raise WeightsError if a file is a pointer that Git LFS left in place of the file."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise WeightsError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or download "
                "the model with `huggingface_hub.snapshot_download`"
            )


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON file that contains an object.

    Args:
        path: The file.
        what: What its folder should contain, for messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        WeightsError: If it is a Git LFS pointer.
        ValueError: If the file does not contain a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {path.parent} does not contain {what}")
    check_downloaded(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain a JSON object, contains a {type(values).__name__}")
    return values
