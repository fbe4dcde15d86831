"""Export to a Hugging Face directory: safetensors files, their index, and config.json.

Tensors are read, converted and written one by one: memory holds what one rule of the weight map reads and makes,
whatever the size of the model. The content of each file is planned from names, dtypes and shapes before anything is
read.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from titan_ckpt.convert._atomic import new_directory
from titan_ckpt.convert._json import read_json
from titan_ckpt.convert.source import AnySpec, Cast, StripPrefix, TensorSource, size_of
from titan_ckpt.convert.weight_map import WeightMap, check_expressible, through
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import Manifest, directory_name
from titan_ckpt.format.safetensors_header import bytes_of, is_storable, make_header
from titan_ckpt.load.reader import CheckpointReader, open_checkpoint
from titan_ckpt.messages import local_path, reason_of

CONFIG = "config.json"
ORIGIN = "titan_checkpoint.json"  # the checkpoint that an export was made of: its step and its manifest's digest
INDEX = "model.safetensors.index.json"


@dataclass
class _File:
    """A planned file."""

    names: list[str] = field(default_factory=list)
    size: int = 0


def export(
    source: TensorSource,
    directory: str | Path,
    weight_map: WeightMap | None = None,
    *,
    prefix: str = "model/",
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    max_file_bytes: int = 5_000_000_000,
    extra_files: Iterable[str | Path] = (),
    replace: bool = False,
) -> None:
    """Write weights as a directory that `transformers` loads with `from_pretrained`.

    Args:
        source: The weights, e.g. `open_checkpoint(...)`.
        directory: The directory to write; it appears once it is complete.
        weight_map: Converts internal names and shapes to Hugging Face's; None if they are the same.
        prefix: Prefix of the names of the model's tensors in the source; it is removed.
        dtype: The dtype to write floating-point weights in; None keeps their dtypes.
        config: The content of config.json; None for the weight map's.
        max_file_bytes: Maximum file size; a single larger tensor gets its own file.
        extra_files: Files to copy into the directory, e.g. generation_config.json and the tokenizer's files.
        replace: Whether an existing directory is replaced, once the new one is complete.

    Raises:
        CheckpointError: If the map does not match the source, the directory exists, or it cannot be written.
    """
    seen: TensorSource = StripPrefix(source, prefix)
    if weight_map is not None:
        seen = through(seen, weight_map, "to_external")
        config = weight_map.config if config is None else config
    if dtype is not None:
        seen = Cast(seen, dtype)
    origin = _origin_of(source.manifest) if isinstance(source, CheckpointReader) else None
    write_huggingface(
        seen, directory, config, max_file_bytes=max_file_bytes, extra_files=extra_files, origin=origin, replace=replace
    )


class HuggingFaceExport:
    """Export each published checkpoint: `Checkpointer(..., exporters=[HuggingFaceExport(...)])`.

    It reads the published checkpoint, so with asynchronous saves training does not wait, and no GPU memory is used.
    """

    def __init__(
        self, directory: str | Path, weight_map: WeightMap | None = None, *, every: int = 1, **options: Any
    ) -> None:
        """Prepare.

        Args:
            directory: Where to write one directory per step. An existing one of the same checkpoint is left unchanged;
                one of another checkpoint, of a line that the run left, is replaced.
            weight_map: See `export`.
            every: Export only steps that are multiples of this.
            options: Further arguments of `export`.

        Raises:
            CheckpointError: If the map has tensors for which Hugging Face's format has no place.
        """
        if weight_map is not None:
            check_expressible(weight_map)
        self._directory, self._weight_map = local_path(directory), weight_map
        self._every, self._options = every, options

    def __call__(self, path: str) -> None:
        """Export one checkpoint."""
        with open_checkpoint(path) as checkpoint:
            target = self._directory / directory_name(checkpoint.manifest.step)
            if checkpoint.manifest.step % self._every or _read_origin(target) == _origin_of(checkpoint.manifest):
                return
            if target.exists() and _read_origin(target) is None:
                raise CheckpointError(
                    f"{target} exists and has no {ORIGIN}, so it is not an export of a checkpoint: move it away"
                )
            export(checkpoint, target, self._weight_map, replace=True, **self._options)


def write_huggingface(
    source: TensorSource,
    directory: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    max_file_bytes: int = 5_000_000_000,
    extra_files: Iterable[str | Path] = (),
    origin: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write a source with its names and dtypes unchanged; see `export`.

    Args:
        source: The tensors, under Hugging Face's names.
        directory: The directory to write.
        config: The content of config.json; None for no such file.
        max_file_bytes: Maximum file size.
        extra_files: Files to copy into the directory.
        origin: The content of titan_checkpoint.json; None for no such file.
        replace: Whether an existing directory is replaced.

    Raises:
        CheckpointError: If the directory exists, or it cannot be written.
    """
    if max_file_bytes < 1:
        raise CheckpointError(f"max_file_bytes must be at least 1, not {max_file_bytes}")
    files = _plan(source.tensors, max_file_bytes)
    extra = [local_path(path) for path in extra_files]
    _check_extra(extra, {CONFIG, INDEX, ORIGIN, *files})
    with new_directory(Path(directory), replace=replace) as staging:
        for name, file in files.items():
            with (staging / name).open("wb") as stream:
                _write_file(stream, source, file.names)
        if len(files) > 1:
            _write_json(staging / INDEX, _index_of(files))
        if config is not None:
            _write_json(staging / CONFIG, _config_of(config, source.tensors))
        if origin is not None:
            _write_json(staging / ORIGIN, origin)
        for path in extra:
            shutil.copyfile(path, staging / path.name)


def _origin_of(manifest: Manifest) -> dict[str, Any]:
    return {"step": manifest.step, "digest": manifest.digest}


def _read_origin(directory: Path) -> Any:
    """Return what an export says it was made of; None if it says nothing readable."""
    try:
        return read_json(directory / ORIGIN)
    except CheckpointError:
        return None


def _plan(tensors: Mapping[str, AnySpec], max_file_bytes: int) -> dict[str, _File]:
    files = [_File()]
    for name, spec in tensors.items():
        if not is_storable(spec.dtype):
            raise CheckpointError(
                f"{name} is {spec.dtype}, which the safetensors format lacks: export in another dtype"
            )
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
            raise CheckpointError(f"extra file {path} is not a file")
        if path.name in taken:
            raise CheckpointError(f"extra file {path} conflicts with the {path.name} that the export writes")
        taken.add(path.name)


def _write_file(stream: BinaryIO, source: TensorSource, names: list[str]) -> None:
    stream.write(make_header([(name, source.tensors[name].dtype, source.tensors[name].shape) for name in names]))
    for name in names:
        stream.write(bytes_of(source.read(name)))


def _index_of(files: Mapping[str, _File]) -> dict[str, Any]:
    where = {name: file_name for file_name, file in files.items() for name in file.names}
    return {"metadata": {"total_size": sum(file.size for file in files.values())}, "weight_map": where}


def _config_of(config: Mapping[str, Any], tensors: Mapping[str, AnySpec]) -> dict[str, Any]:
    """Set the config's dtype if all weights have the same one: `from_pretrained` uses it."""
    dtypes = {spec.dtype for spec in tensors.values() if spec.dtype.is_floating_point}
    result = dict(config)
    if len(dtypes) == 1:
        result.pop("dtype", None)
        result["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    return result


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be written as JSON: {reason_of(error)}") from error
