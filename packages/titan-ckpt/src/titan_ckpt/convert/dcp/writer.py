"""Tensors of any source as a folder that torch's distributed checkpoint (DCP) loads.

DCP's own writer does the writing; the planner below hands it tensors without data to plan with, and reads each tensor
when its turn comes.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from titan_ckpt.convert._atomic import new_folder
from titan_ckpt.convert.dcp.reader import put
from titan_ckpt.convert.source import TensorSource
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import parts_of


class _LazyPlanner(DefaultSavePlanner):
    def __init__(self, source: TensorSource, names: dict[str, str]) -> None:
        super().__init__()
        self._source, self._names = source, names

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._source.read(self._names[write_item.index.fqn])


def export_dcp(source: TensorSource, folder: str | Path, *, prefix: str = "") -> None:
    """Write a source as a DCP folder, tensor by tensor.

    The nesting that names have in a checkpoint (`model/layers.0.w`) becomes DCP's (`model.layers.0.w`, with the path in
    its record). The record is a pickle, as DCP wants it.

    Args:
        source: the tensors and values.
        folder: the folder to make; it appears once it is complete.
        prefix: what to put before the tensors' names, e.g. `model/`.

    Raises:
        CheckpointError: when names collide, the folder is there already, or it cannot be written.
    """
    state: dict[str, Any] = dict(source.values)
    names: dict[str, str] = {}
    for name, spec in source.tensors.items():
        path = tuple(parts_of(prefix + name))
        flat = ".".join(path)
        if flat in names:
            raise CheckpointError(f"{name} and {names[flat]} would have the same name in DCP, {flat}")
        names[flat] = name
        put(state, path, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
    with new_folder(Path(folder)) as staging, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
        writer = FileSystemWriter(staging, single_file_per_rank=True, sync_files=False)
        save(state, storage_writer=writer, planner=_LazyPlanner(source, names), no_dist=True)
