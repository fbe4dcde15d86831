"""A Hugging Face directory with one or several safetensors files, as a source of tensors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from titan_ckpt.convert._json import read_json
from titan_ckpt.convert.huggingface.writer import CONFIG, INDEX
from titan_ckpt.convert.safetensors_file import SafetensorsFile
from titan_ckpt.convert.source import AnySpec
from titan_ckpt.convert.weight_map import raise_mismatches
from titan_ckpt.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX_LIMIT = 1 << 27  # bytes: about a million tensors
_FILE_NAME = re.compile(r"[^/\\\x00]+\.safetensors")


class HuggingFaceDirectory:
    """The weights of a Hugging Face directory.

    Attributes:
        tensors: The tensors, file by file.
        values: Empty; such a directory holds weights only.
        config: The content of config.json; empty without one.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a directory and compare its files with its index; no tensor is read.

        Args:
            directory: A directory with model.safetensors, or with several files and model.safetensors.index.json.

        Raises:
            CheckpointError: If there is neither, or a file is corrupt or does not hold what the index says.
        """
        self.directory = Path(directory)
        self.values: Mapping[str, Any] = {}
        self.config = read_json(self.directory / CONFIG) if (self.directory / CONFIG).exists() else {}
        files = _files_of(self.directory)
        opened = {name: SafetensorsFile(self.directory / name) for name in files}
        _compare(self.directory, files, opened)
        self._file_of = {key: opened[name] for name, keys in files.items() for key in (keys or opened[name].tensors)}
        self.tensors: dict[str, AnySpec] = {key: file.tensors[key] for key, file in self._file_of.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        return self._file_of[name].read(name)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor; only that slice is read from the disk."""
        return self._file_of[name].read_slice(name, offsets, sizes)


def _files_of(directory: Path) -> dict[str, list[str] | None]:
    """Return the files, each with the names that the index gives it; None for a single file without an index."""
    if (directory / INDEX).exists() and not _is_whole(directory):
        weight_map = read_json(directory / INDEX, INDEX_LIMIT).get("weight_map")
        if not _is_weight_map(weight_map):
            raise CheckpointError(f'{directory / INDEX} has no "weight_map" from tensors to files')
        files: dict[str, list[str] | None] = {}
        for key, name in weight_map.items():
            if not _FILE_NAME.fullmatch(name):
                raise CheckpointError(f"{directory / INDEX} names the file {name!r}, which is not in its directory")
            keys = files.setdefault(name, [])
            assert keys is not None
            keys.append(key)
        return dict(sorted(files.items()))
    if (directory / SINGLE).exists():
        return {SINGLE: None}
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}{_hint(directory)}")


def _is_whole(directory: Path) -> bool:
    """Return whether there is a file with all weights: it is newer than an index that does not name it.

    transformers, which reads such a file first, leaves the index of an earlier model in place.
    """
    if not (directory / SINGLE).exists():
        return False
    try:
        weight_map = read_json(directory / INDEX, INDEX_LIMIT).get("weight_map")
    except CheckpointError:
        return True
    return not (_is_weight_map(weight_map) and SINGLE in weight_map.values())


def _is_weight_map(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value.values())


def _hint(directory: Path) -> str:
    if not directory.is_dir():
        return ": no such directory"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in directory.glob(pattern))
    if pickled:
        return f", only {pickled[0]}: open a single file of torch.save by its own path (convert --from torch)"
    return ""


def _compare(directory: Path, files: Mapping[str, list[str] | None], opened: Mapping[str, SafetensorsFile]) -> None:
    missing: set[str] = set()
    unexpected: set[str] = set()
    for name, keys in files.items():
        if keys is not None:
            held = opened[name].tensors.keys()
            missing |= {f"{key} in {name}" for key in set(keys) - held}
            unexpected |= {f"{key} in {name}" for key in held - set(keys)}
    raise_mismatches(
        f"{directory}: the files do not match {INDEX}",
        {"missing": missing, "unexpected, not in the index": unexpected},
    )
