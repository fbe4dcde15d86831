"""Files of `torch.save`: read with the weights-only unpickler, and written for torchtune and other programs."""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._atomic import new_file
from titan_ckpt.convert._files import file_size
from titan_ckpt.convert._torch_load import load_entry
from titan_ckpt.convert.source import FullTensorSource, Spec, TensorSource, size_of
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import encode, key_of
from titan_ckpt.format.safetensors_header import bytes_of

_ALIGNMENT = 64
_MOST_VIEWS = 64  # times as many bytes of tensors as the file has: tied weights share their data
_SMALL = 64 << 20  # bytes of tensors that any file may hold


class TorchFile(FullTensorSource):
    """The content of a file of `torch.save`: tensors in dicts, nested or not.

    Names are paths through the dicts, joined with "/". The file is memory-mapped: what is not read costs nothing.

    Attributes:
        tensors: The tensors.
        values: The other entries that are JSON values.
        left_out: The remaining entries, with the reason why each is left out.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a file; no tensor data is read.

        Args:
            path: The file.

        Raises:
            CheckpointError: If it is absent, corrupt, or holds anything but tensors and plain values.
        """
        path = Path(path)
        size = file_size(path)
        loaded = load_entry(path, size, str(path))
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a dict of tensors")
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
        total = sum(map(size_of, self.tensors.values()))
        if total > max(_SMALL, _MOST_VIEWS * size):
            raise CheckpointError(
                f"{path} is refused: its tensors have {total} bytes, the file has {size}: they share the same data too "
                "often"
            )

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor; its data stays in the file until it is used."""
        return self._tensors[name]

    def _take(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        """Move the tensors of `value` into the table; return the other entries, None if there are none."""
        name = key_of(path)
        if depth > 32:
            raise CheckpointError(f"{name[:80]} is nested deeper than 32 levels")
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

    `torch.save` needs all tensors at once. They are gathered in a temporary memory-mapped file next to the target,
    which temporarily doubles the disk space but needs host memory for the largest tensor only.

    Args:
        source: The tensors, under their names in the file.
        path: The file to write; it appears once it is complete.

    Raises:
        CheckpointError: If the file exists or cannot be written.
    """
    path = Path(path)
    with new_file(path) as staging:
        gathered = staging.with_name(staging.name + ".gathered")
        try:
            torch.save(dict(_gather(source, gathered)), staging)
        finally:
            gathered.unlink(missing_ok=True)


def _gather(source: TensorSource, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Write the tensors one by one to a file, and yield them memory-mapped from it."""
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
        mapped = mmap.mmap(file.fileno(), end)  # closed together with the last tensor
    for name, spec in source.tensors.items():
        if size_of(spec) == 0:
            yield name, torch.empty(spec.shape, dtype=spec.dtype)
            continue
        count = size_of(spec) // spec.dtype.itemsize
        yield name, torch.frombuffer(mapped, dtype=spec.dtype, count=count, offset=starts[name]).reshape(spec.shape)
