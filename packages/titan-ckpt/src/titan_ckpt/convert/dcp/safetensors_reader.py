"""What DCP's safetensors writer leaves unconsolidated: files per rank, with notes on where their parts belong."""

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

_NOTES = "DCP_SHARDING_INFO"


class DcpSafetensorsFolder:
    """The tensors of such a folder, put together from all its files.

    The notes tell where each part begins and nothing of the whole, which is taken to end where the last part does.

    Attributes:
        tensors: what there is.
        values: nothing; this writer keeps tensors alone.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder; no tensor is read.

        Args:
            folder: the folder that holds the `shard-...safetensors` files.

        Raises:
            CheckpointError: when a file is damaged, or the parts do not make up whole tensors.
        """
        self.folder = Path(folder)
        self.values: Mapping[str, Any] = {}
        self._pieces: dict[str, list[tuple[SafetensorsFile, Box]]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            file = SafetensorsFile(path)
            notes = parse_json(file.metadata.get(_NOTES, "{}"), f"{_NOTES} in {path}")
            for name, spec in file.tensors.items():
                if dtypes.setdefault(name, spec.dtype) != spec.dtype:
                    raise CheckpointError(f"{self.folder}: the parts of {name} are of different types")
                self._pieces.setdefault(name, []).append((file, Box(_offsets(path, notes, name, spec), spec.shape)))
        if not self._pieces:
            raise CheckpointError(f"{self.folder} holds no safetensors files")
        self.tensors: dict[str, Spec] = {}
        for name, pieces in self._pieces.items():
            boxes = [box for _, box in pieces]
            ends = [tuple(at + size for at, size in zip(*box, strict=True)) for box in boxes]
            if len({len(end) for end in ends}) > 1:
                raise CheckpointError(f"{self.folder}: the parts of {name} have different numbers of dimensions")
            shape = tuple(max(along) for along in zip(*ends, strict=True))
            check_cover(name, shape, boxes)
            self.tensors[name] = Spec(dtypes[name], shape)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        shape = self.tensors[name].shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor, from the files that it touches."""
        pieces = self._pieces[name]

        def read(which: int, part: Box) -> torch.Tensor:
            return pieces[which][0].read_slice(name, part.offsets, part.lengths)

        wanted = Box(tuple(offsets), tuple(sizes))
        return assemble(self.tensors[name].dtype, wanted, [box for _, box in pieces], read)


def is_dcp_safetensors(folder: Path) -> bool:
    """Tell whether a folder's first safetensors file has DCP's notes."""
    first = min(folder.glob("*.safetensors"), default=None)
    try:
        return first is not None and _NOTES in SafetensorsFile(first).metadata
    except CheckpointError:
        return False


def _offsets(path: Path, notes: Mapping[str, Any], name: str, spec: Spec) -> tuple[int, ...]:
    note = notes.get(name)
    offsets = note.get("saved_offsets") if isinstance(note, dict) else None
    if not isinstance(offsets, list) or len(offsets) != len(spec.shape):
        raise CheckpointError(f"{path} does not say which part of {name} it holds")
    if any(type(offset) is not int or not 0 <= offset < 1 << 62 for offset in offsets):
        raise CheckpointError(f"{path} says nonsense of where its part of {name} begins")
    return tuple(offsets)
