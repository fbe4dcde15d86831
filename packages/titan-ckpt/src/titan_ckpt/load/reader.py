"""One checkpoint, opened: its manifest, its values, and its tensors, read whole or in parts and always checked."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, whole
from titan_ckpt.format.index import Content, TensorSpec, read_content, read_state
from titan_ckpt.format.json_values import decode
from titan_ckpt.format.manifest import Manifest, read_manifest
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.load.reads import Wanted, fill
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage, parent_and_name


class CheckpointReader:
    """A checkpoint that is open for reading; made by `open_checkpoint`. Several threads may read from it.

    Attributes:
        path: its path or URL.
        manifest: what is known of it as a whole.
        tensors: its tensors by name, with type, shape and chunks.
    """

    def __init__(self, storage: Storage, name: str, manifest: Manifest, content: Content) -> None:
        self.path = f"{storage.url.rstrip('/')}/{name}"
        self.manifest = manifest
        self.tensors: dict[str, TensorSpec] = content.tensors
        self._content = content
        self._files = TensorFiles(storage, name, manifest)

    @property
    def values(self) -> dict[str, Any]:
        """What is not a tensor, by top-level entry; a fresh copy each time."""
        return {name: decode(value) for name, value in self._content.values.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole, to CPU memory.

        Args:
            name: its name in `tensors`.

        Returns:
            The tensor, in its own dtype.

        Raises:
            CheckpointError: when there is none of that name, or what it takes is damaged.
        """
        shape = self._spec(name).shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor, to CPU memory; only the pieces that hold it are read.

        Args:
            name: the tensor's name.
            offsets: where the part begins.
            sizes: its shape.

        Returns:
            The part, in the tensor's dtype.

        Raises:
            CheckpointError: when there is no such part, or what it takes is damaged.
        """
        part = torch.empty(tuple(sizes), dtype=self._spec(name).dtype)
        self.read_into(name, part, offsets)
        return part

    def read_into(self, name: str, destination: torch.Tensor, offsets: Sequence[int] | None = None) -> None:
        """Fill a tensor with a part of one tensor.

        Args:
            name: the tensor's name.
            destination: what to fill: on any device, with any strides; another dtype is cast to.
            offsets: where the part begins, which has the shape of `destination`; None for the beginning.

        Raises:
            CheckpointError: when there is no such part, or what it takes is damaged; then what was sound of it may
                have been copied, nothing else.
        """
        spec = self._spec(name)
        box = Box(whole(destination.shape).offsets if offsets is None else tuple(offsets), tuple(destination.shape))
        if len(box.offsets) != len(spec.shape) or any(
            at < 0 or at + length > size for at, length, size in zip(*box, spec.shape, strict=False)
        ):
            raise CheckpointError(
                f"{name} has the shape {list(spec.shape)}, and no part {list(box.lengths)} at {box[0]}"
            )
        damages = fill(self._files, self._content.piece_bytes, [Wanted(name, spec, box, destination.detach())])
        if damages:
            raise CheckpointError(f"{self.path} is damaged: {'; '.join(damages)}")

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
    """Open a checkpoint to look at it and to read from it, without a model and without torch.distributed.

    Args:
        path: its folder, as a path or URL.

    Returns:
        It; close it, or use it in a `with` statement.

    Raises:
        CheckpointError: when it is no checkpoint, or its manifest or state.json is damaged.
    """
    parent, name = parent_and_name(str(path))
    storage = open_storage(parent)
    manifest = read_manifest(storage, name)
    return CheckpointReader(storage, name, manifest, read_content(read_state(storage, name, manifest), manifest))
