"""Unconsolidated output of DCP's safetensors writer: files per rank, with sharding info in their headers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._assemble import assemble, check_cover
from titan_ckpt.convert._json import parse_json
from titan_ckpt.convert.safetensors_file import SafetensorsFile
from titan_ckpt.convert.source import Spec
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box

_INFO = "DCP_SHARDING_INFO"


class DcpSafetensorsDirectory:
    """The tensors of such a directory, assembled from all its files.

    The sharding info says where each part starts but not the global shape; the tensor is assumed to end where its last
    part ends.

    Attributes:
        tensors: The tensors.
        values: Empty; this writer stores tensors only.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a directory; no tensor is read.

        Args:
            directory: The directory that holds the `shard-...safetensors` files.

        Raises:
            CheckpointError: If a file is corrupt, or the parts do not make up full tensors.
        """
        self.directory = Path(directory)
        self.values: Mapping[str, Any] = {}
        self._chunks: dict[str, list[tuple[SafetensorsFile, Box]]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            file = SafetensorsFile(path)
            info = parse_json(file.metadata.get(_INFO, "{}"), f"{_INFO} in {path}")
            for name, spec in file.tensors.items():
                if dtypes.setdefault(name, spec.dtype) != spec.dtype:
                    raise CheckpointError(f"{self.directory}: the parts of {name} have different dtypes")
                self._chunks.setdefault(name, []).append((file, Box(_offsets(path, info, name, spec), spec.shape)))
        if not self._chunks:
            raise CheckpointError(f"{self.directory} holds no safetensors files")
        self.tensors: dict[str, Spec] = {}
        for name, chunks in self._chunks.items():
            boxes = [box for _, box in chunks]
            ends = [tuple(at + size for at, size in zip(*box, strict=True)) for box in boxes]
            if len({len(end) for end in ends}) > 1:
                raise CheckpointError(f"{self.directory}: the parts of {name} have different numbers of dimensions")
            shape = tuple(max(along) for along in zip(*ends, strict=True))
            check_cover(name, shape, boxes)
            self.tensors[name] = Spec(dtypes[name], shape)

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        shape = self.tensors[name].shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor from the files that hold it."""
        chunks = self._chunks[name]

        def read(which: int, part: Box) -> torch.Tensor:
            return chunks[which][0].read_slice(name, part.offsets, part.lengths)

        wanted = Box(tuple(offsets), tuple(sizes))
        return assemble(self.tensors[name].dtype, wanted, [box for _, box in chunks], read)


def is_dcp_safetensors(directory: Path) -> bool:
    """Return whether a directory's first safetensors file has DCP's sharding info."""
    first = min(directory.glob("*.safetensors"), default=None)
    try:
        return first is not None and _INFO in SafetensorsFile(first).metadata
    except CheckpointError:
        return False


def _offsets(path: Path, info: Mapping[str, Any], name: str, spec: Spec) -> tuple[int, ...]:
    of_tensor = info.get(name)
    offsets = of_tensor.get("saved_offsets") if isinstance(of_tensor, dict) else None
    if not isinstance(offsets, list) or len(offsets) != len(spec.shape):
        raise CheckpointError(f"{path} does not say which part of {name} it holds")
    if any(type(offset) is not int or not 0 <= offset < 1 << 62 for offset in offsets):
        raise CheckpointError(f"{path}: invalid offsets {str(offsets)[:80]} of {name}")
    return tuple(offsets)
