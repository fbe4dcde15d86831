"""Export to a Hugging Face folder: safetensors files, their index, and config.json.

Tensors are read, changed and written one by one: in memory is what one rule of the weight map reads and makes, whatever
the size of the model. What each file will hold is planned from names, types and shapes before anything is read.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from titan_ckpt.convert._atomic import new_folder
from titan_ckpt.convert.source import AnySpec, Cast, TensorSource, Under, size_of
from titan_ckpt.convert.weight_map import Mapped, WeightMap
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import folder_name
from titan_ckpt.format.safetensors_header import bytes_of, is_storable, make_header
from titan_ckpt.load.reader import open_checkpoint

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


@dataclass
class _File:
    """One file to be written."""

    names: list[str] = field(default_factory=list)
    size: int = 0


def export(
    source: TensorSource,
    folder: str | Path,
    weight_map: WeightMap | None = None,
    *,
    prefix: str = "model/",
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    max_file_bytes: int = 5_000_000_000,
    extra_files: Iterable[str | Path] = (),
) -> None:
    """Write weights as a folder that `transformers` loads with `from_pretrained`.

    Args:
        source: where the weights are, e.g. `open_checkpoint(...)`.
        folder: the folder to make; it appears once it is complete.
        weight_map: makes Hugging Face's names and shapes of the native ones; None when they are so already.
        prefix: what the names of the model's tensors begin with in the source; it is taken off.
        dtype: the type to write floating-point weights in; None to leave them as they are.
        config: what to write as config.json; None for the weight map's.
        max_file_bytes: start another file before one grows beyond this; a single larger tensor gets its own file.
        extra_files: files to copy into the folder as they are: generation_config.json, the tokenizer's.

    Raises:
        CheckpointError: when the map does not fit the source, the folder is there already, or it cannot be written.
    """
    seen: TensorSource = Under(source, prefix)
    if weight_map is not None:
        seen = Mapped(seen, weight_map.rules, "to_foreign")
        config = weight_map.config if config is None else config
    if dtype is not None:
        seen = Cast(seen, dtype)
    write_huggingface(seen, folder, config, max_file_bytes=max_file_bytes, extra_files=extra_files)


class HuggingFaceExport:
    """Exports each checkpoint once it is published: `Checkpointer(..., also=[HuggingFaceExport(...)])`.

    It reads the published checkpoint, so training waits for nothing and no GPU memory is taken.
    """

    def __init__(
        self, folder: str | Path, weight_map: WeightMap | None = None, *, every: int = 1, **options: Any
    ) -> None:
        """Prepare.

        Args:
            folder: where to make one folder per step, of the step's name; those that are there are left as they are.
            weight_map: see `export`.
            every: export only the steps that this divides.
            options: more arguments of `export`.
        """
        self._folder, self._weight_map, self._every, self._options = Path(folder), weight_map, every, options

    def __call__(self, path: str) -> None:
        """Export one checkpoint."""
        with open_checkpoint(path) as checkpoint:
            target = self._folder / folder_name(checkpoint.manifest.step)
            if checkpoint.manifest.step % self._every == 0 and not target.exists():
                export(checkpoint, target, self._weight_map, **self._options)


def write_huggingface(
    source: TensorSource,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    max_file_bytes: int = 5_000_000_000,
    extra_files: Iterable[str | Path] = (),
) -> None:
    """Write a source as it is, its names and types unchanged; see `export`.

    Args:
        source: the tensors, under Hugging Face's names.
        folder: the folder to make.
        config: what to write as config.json; None for no such file.
        max_file_bytes: start another file before one grows beyond this.
        extra_files: files to copy into the folder.

    Raises:
        CheckpointError: when the folder is there already, or it cannot be written.
    """
    if max_file_bytes < 1:
        raise CheckpointError(f"max_file_bytes must be at least 1, not {max_file_bytes}")
    files = _plan(source.tensors, max_file_bytes)
    extra = [Path(path) for path in extra_files]
    _check_extra(extra, {CONFIG, INDEX, *files})
    with new_folder(Path(folder)) as staging:
        for name, file in files.items():
            with (staging / name).open("wb") as stream:
                _write_file(stream, source, file.names)
        if len(files) > 1:
            _write_json(staging / INDEX, _index_of(files))
        if config is not None:
            _write_json(staging / CONFIG, _config_of(config, source.tensors))
        for path in extra:
            shutil.copyfile(path, staging / path.name)


def _plan(tensors: Mapping[str, AnySpec], max_file_bytes: int) -> dict[str, _File]:
    files = [_File()]
    for name, spec in tensors.items():
        if not is_storable(spec.dtype):
            raise CheckpointError(f"{name} is of {spec.dtype}, which safetensors cannot hold: export in another dtype")
        size = size_of(spec)
        if files[-1].names and files[-1].size + size > max_file_bytes:
            files.append(_File())
        files[-1].names.append(name)
        files[-1].size += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{place:05d}-of-{len(files):05d}.safetensors": file for place, file in enumerate(files, start=1)}


def _check_extra(extra: list[Path], taken: set[str]) -> None:
    for path in extra:
        if not path.is_file():
            raise CheckpointError(f"{path}, to be copied into the folder, is no file")
        if path.name in taken:
            raise CheckpointError(f"{path} cannot be copied into the folder: the export writes its own {path.name}")
        taken.add(path.name)


def _write_file(stream: BinaryIO, source: TensorSource, names: list[str]) -> None:
    stream.write(make_header([(name, source.tensors[name].dtype, source.tensors[name].shape) for name in names]))
    for name in names:
        stream.write(bytes_of(source.read(name)))


def _index_of(files: Mapping[str, _File]) -> dict[str, Any]:
    where = {name: file_name for file_name, file in files.items() for name in file.names}
    return {"metadata": {"total_size": sum(file.size for file in files.values())}, "weight_map": where}


def _config_of(config: Mapping[str, Any], tensors: Mapping[str, AnySpec]) -> dict[str, Any]:
    """Say in the config which type the weights have, where it is one: `from_pretrained` goes by that."""
    dtypes = {spec.dtype for spec in tensors.values() if spec.dtype.is_floating_point}
    told = dict(config)
    if len(dtypes) == 1:
        told.pop("dtype", None)
        told["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    return told


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be written, for it holds what is no JSON: {error}") from error
