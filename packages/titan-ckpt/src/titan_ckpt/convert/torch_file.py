"""Single files of `torch.save`: in, read with the weights-only unpickler, and out, for torchtune and others."""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._atomic import new_file
from titan_ckpt.convert._files import file_size
from titan_ckpt.convert._torch_load import load_entry
from titan_ckpt.convert.source import Spec, TensorSource, Whole, size_of
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import encode, key_of
from titan_ckpt.format.safetensors_header import bytes_of

_ALIGNMENT = 64


class TorchFile(Whole):
    """The content of a file of `torch.save`: tensors in dicts, nested or not.

    Names are paths through the dicts, joined with "/". The file is mapped to memory: what is not read costs nothing.

    Attributes:
        tensors: the tensors.
        values: the other entries that are JSON.
        left_out: the other entries that are not, with the reason.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a file; no tensor's data is read.

        Args:
            path: the file.

        Raises:
            CheckpointError: when it is absent, damaged, or holds anything but tensors and plain values.
        """
        path = Path(path)
        loaded = load_entry(path, file_size(path), str(path))
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path} holds a {type(loaded).__name__} where a dict of tensors is wanted")
        self._tensors: dict[str, torch.Tensor] = {}
        self.values: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        try:
            for key, value in loaded.items():
                kept = self._take(value, (str(key),), 0)
                if kept is not None:
                    self.values[str(key)] = kept
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.tensors = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; its data is in the file until it is used."""
        return self._tensors[name]

    def _take(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        """Move the tensors of `value` into the table; return what else there is, None when there is nothing."""
        name = key_of(path)
        if depth > 32:
            raise CheckpointError(f"{name[:80]} is nested deeper than any state")
        if isinstance(value, torch.Tensor):
            self._tensors[name] = value.detach()
            return None
        if isinstance(value, Mapping):
            kept = {str(key): self._take(item, (*path, str(key)), depth + 1) for key, item in value.items()}
            return {key: item for key, item in kept.items() if item is not None} or None
        try:
            encode(value, name)
        except CheckpointError as error:
            self.left_out[name] = str(error)
            return None
        return value


def export_torch(source: TensorSource, path: str | Path) -> None:
    """Write tensors as one file of `torch.save`, a flat dict by name.

    `torch.save` wants all of them at once. They are gathered in a second file beside the first, which is mapped to
    memory: while it lasts, it takes as much disk again, but host memory no more than the largest tensor needs.

    Args:
        source: the tensors, under the names that they are to have.
        path: the file to make; it appears once it is complete.

    Raises:
        CheckpointError: when the file is there already or cannot be written.
    """
    path = Path(path)
    with new_file(path) as staging:
        gathered = staging.with_name(staging.name + ".gathered")
        try:
            torch.save(dict(_gather(source, gathered)), staging)
        finally:
            gathered.unlink(missing_ok=True)


def _gather(source: TensorSource, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Write the tensors one by one to a file, and yield them as they lie there."""
    starts, end = {}, 0
    for name, spec in source.tensors.items():
        starts[name] = end
        end += -(-size_of(spec) // _ALIGNMENT) * _ALIGNMENT
    if end == 0:
        yield from ((name, source.read(name)) for name in source.tensors)
        return
    with path.open("w+b") as file:
        file.truncate(end)
        for name in source.tensors:
            file.seek(starts[name])
            file.write(bytes_of(source.read(name)))
        file.flush()
        mapped = mmap.mmap(file.fileno(), end)  # closed when the last tensor is
    for name, spec in source.tensors.items():
        if size_of(spec) == 0:
            yield name, torch.empty(spec.shape, dtype=spec.dtype)
            continue
        count = size_of(spec) // spec.dtype.itemsize
        yield name, torch.frombuffer(mapped, dtype=spec.dtype, count=count, offset=starts[name]).reshape(spec.shape)
