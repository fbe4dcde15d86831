"""`open_checkpoint`: read the manifest, the values and single tensors of one checkpoint, always verified."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.boxes import Box, full_box
from titan_ckpt.format.index import Content, TensorSpec, read_content, read_state
from titan_ckpt.format.json_values import decode
from titan_ckpt.format.manifest import Manifest, read_manifest
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.load.reads import Wanted, fill
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage, parent_and_name


class CheckpointReader:
    """A checkpoint open for reading, as returned by `open_checkpoint`; thread-safe.

    Attributes:
        path: Its path or URL.
        manifest: Its manifest.
        tensors: Dtype, shape and chunks of its tensors, by name.
    """

    def __init__(self, storage: Storage, name: str, manifest: Manifest, content: Content) -> None:
        self.path = f"{storage.url.rstrip('/')}/{name}"
        self.manifest = manifest
        self.tensors: dict[str, TensorSpec] = content.tensors
        self._content = content
        self._files = TensorFiles(storage, name, manifest)

    @property
    def values(self) -> dict[str, Any]:
        """Everything that is not a tensor, by top-level entry; a new copy on each access."""
        return {name: decode(value) for name, value in self._content.values.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor to CPU memory.

        Args:
            name: A name in `tensors`.

        Returns:
            The tensor, in its own dtype.

        Raises:
            CheckpointError: If there is no such tensor, or its data is corrupt.
        """
        shape = self._spec(name).shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor to CPU memory; only the pieces that hold it are read.

        Args:
            name: The tensor's name.
            offsets: Start of the slice.
            sizes: Shape of the slice.

        Returns:
            The slice, in the tensor's dtype.

        Raises:
            CheckpointError: If there is no such slice, or its data is corrupt.
        """
        with system_errors(f"read {name} of {self.path}"):
            part = torch.empty(tuple(sizes), dtype=self._spec(name).dtype)
            self.read_into(name, part, offsets)
        return part

    def read_into(self, name: str, destination: torch.Tensor, offsets: Sequence[int] | None = None) -> None:
        """Fill a tensor from a slice of a tensor in the checkpoint.

        Args:
            name: The name of the tensor in the checkpoint.
            destination: The tensor to fill, on any device, with any strides; values are cast to its dtype.
            offsets: Start of the slice, which has the shape of `destination`; None for zeros.

        Raises:
            CheckpointError: If there is no such slice, or its data is corrupt. In the latter case `destination` may
                be partly filled, with verified data only.
        """
        spec = self._spec(name)
        box = Box(full_box(destination.shape).offsets if offsets is None else tuple(offsets), tuple(destination.shape))
        if len(box.offsets) != len(spec.shape) or any(
            at < 0 or at + length > size for at, length, size in zip(*box, spec.shape, strict=False)
        ):
            raise CheckpointError(
                f"{name} has the shape {list(spec.shape)}: it has no slice of shape {list(box.lengths)} at {box[0]}"
            )
        problems = fill(self._files, self._content.piece_bytes, [Wanted(name, spec, box, destination.detach())])
        if problems:
            raise CheckpointError(f"{self.path} is corrupt: {'; '.join(problems)}")

    def close(self) -> None:
        """Close its files."""
        self._files.close()

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        return self.tensors[name]


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Open a checkpoint to inspect it and read from it, without a model and without torch.distributed.

    Args:
        path: The checkpoint's directory, as a path or URL.

    Returns:
        The open checkpoint. Close it, or use it in a `with` statement.

    Raises:
        CheckpointError: If it is not a checkpoint, or its manifest or state.json is corrupt.

    Example:
        >>> with open_checkpoint("runs/x/checkpoints/step-00000100") as checkpoint:
        ...     print(checkpoint.values["progress"], checkpoint.tensors["model/weight"].shape)
        ...     row = checkpoint.read_slice("model/weight", offsets=(0, 0), sizes=(1, 8))
        {'step': 100} (1, 8)
    """
    parent, name = parent_and_name(str(path))
    storage = open_storage(parent)
    manifest = read_manifest(storage, name)
    return CheckpointReader(storage, name, manifest, read_content(read_state(storage, name, manifest), manifest))
