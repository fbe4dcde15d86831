"""A Hugging Face folder of safetensors, single or in several files, as a source of tensors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._json import read_json
from titan_ckpt.convert.huggingface.writer import CONFIG, INDEX
from titan_ckpt.convert.safetensors_file import SafetensorsFile
from titan_ckpt.convert.source import AnySpec
from titan_ckpt.convert.weight_map import refuse_unfit
from titan_ckpt.errors import CheckpointError

SINGLE = "model.safetensors"
_FILE_NAME = re.compile(r"[^/\\\x00]+\.safetensors")


class HuggingFaceFolder:
    """The weights of a Hugging Face folder.

    Attributes:
        tensors: what there is, file by file.
        values: nothing; such a folder holds weights alone.
        config: what config.json says; empty without one.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder and hold its files against its index; no tensor is read.

        Args:
            folder: a folder with model.safetensors, or with several files and model.safetensors.index.json.

        Raises:
            CheckpointError: when there is neither, or a file is damaged or does not hold what the index says.
        """
        self.folder = Path(folder)
        self.values: Mapping[str, Any] = {}
        self.config = read_json(self.folder / CONFIG) if (self.folder / CONFIG).exists() else {}
        files = _files_of(self.folder)
        opened = {name: SafetensorsFile(self.folder / name) for name in files}
        _compare(self.folder, files, opened)
        self._file_of = {key: opened[name] for name, keys in files.items() for key in (keys or opened[name].tensors)}
        self.tensors: dict[str, AnySpec] = {key: file.tensors[key] for key, file in self._file_of.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        return self._file_of[name].read(name)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor; no more than that part is read from the disk."""
        return self._file_of[name].read_slice(name, offsets, sizes)


def _files_of(folder: Path) -> dict[str, list[str] | None]:
    """Return the files and what the index says each holds; None where there is no index to say it."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f'{folder / INDEX} has no "weight_map" from tensors to files')
        files: dict[str, list[str] | None] = {}
        for key, name in weight_map.items():
            if not _FILE_NAME.fullmatch(name):
                raise CheckpointError(f"{folder / INDEX} names the file {name!r}, which is not one of its folder")
            keys = files.setdefault(name, [])
            assert keys is not None
            keys.append(key)
        return dict(sorted(files.items()))
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{_hint(folder)}")


def _hint(folder: Path) -> str:
    if not folder.is_dir():
        return ": there is no such folder"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if pickled:
        return f", only {pickled[0]}: a single file of torch.save is opened as such (convert --from torch)"
    return ""


def _compare(folder: Path, files: Mapping[str, list[str] | None], opened: Mapping[str, SafetensorsFile]) -> None:
    missing: set[str] = set()
    unexpected: set[str] = set()
    for name, keys in files.items():
        if keys is not None:
            held = opened[name].tensors.keys()
            missing |= {f"{key} in {name}" for key in set(keys) - held}
            unexpected |= {f"{key} in {name}" for key in held - set(keys)}
    refuse_unfit(
        f"{folder}: the files do not hold what {INDEX} says",
        {"missing": missing, "unexpected, not in the index": unexpected},
    )
