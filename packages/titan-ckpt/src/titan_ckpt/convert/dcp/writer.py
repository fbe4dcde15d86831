"""Write any source as a directory that torch's distributed checkpoint (DCP) loads.

DCP's own writer does the writing. The planner below gives it meta tensors to plan with, and reads each tensor when it
is written, so that memory holds one tensor at a time.
"""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from titan_ckpt.convert._atomic import new_directory
from titan_ckpt.convert.dcp.reader import put
from titan_ckpt.convert.source import TensorSource
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import path_of

_Path = tuple[str | int, ...]


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor from its source when DCP's writer asks for its data."""

    def __init__(self, source: TensorSource, names: dict[str, str]) -> None:
        super().__init__()
        self._source, self._names = source, names

    def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(state_dict, *args, **kwargs)
        for path, value in _leaves(state_dict):
            if isinstance(value, dict):  # DCP's own flattening drops these
                self.state_dict[_flat(path)], self.mappings[_flat(path)] = value, path

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._source.read(self._names[write_item.index.fqn])


def export_dcp(source: TensorSource, directory: str | Path, *, prefix: str = "") -> None:
    """Write a source as a DCP directory, tensor by tensor.

    Nested names of a checkpoint (`model/layers.0.w`) become DCP's flat names (`model.layers.0.w`, with the path in
    `.metadata`). `.metadata` is a pickle, because DCP requires it.

    Args:
        source: The tensors and values.
        directory: The directory to write; it appears once it is complete.
        prefix: Prefix to add to the tensors' names, e.g. `model/`.

    Raises:
        CheckpointError: If names collide in DCP's flat form, the directory exists, or it cannot be written.
    """
    state: dict[str, Any] = dict(source.values)
    names: dict[str, str] = {}
    for name, spec in source.tensors.items():
        path = tuple(path_of(prefix + name))
        names[_flat(path)] = name
        put(state, path, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
    taken: dict[str, _Path] = {}
    for leaf, _ in _leaves(state):
        other = taken.setdefault(_flat(leaf), leaf)
        if other is not leaf:
            shown = " and ".join("/".join(map(str, path)) for path in (other, leaf))
            raise CheckpointError(f"{shown} would have the same name in DCP, {_flat(leaf)}: rename one of them")
    with new_directory(Path(directory)) as staging, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended: one process writes
        writer = FileSystemWriter(staging, single_file_per_rank=True, sync_files=False)
        save(state, storage_writer=writer, planner=_LazyPlanner(source, names), no_dist=True)


def _leaves(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yield what DCP stores as entries, with their paths; and the empty dicts, which it would drop."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and _is_taken_apart(value):
        for place, item in enumerate(value):
            yield from _leaves(item, (*path, place))
    else:
        yield path, value


def _is_taken_apart(values: list[Any]) -> bool:
    """Return whether DCP stores the items of a list one by one: a dict is among them, at any depth of lists."""
    return any(isinstance(item, dict) or (isinstance(item, list) and _is_taken_apart(item)) for item in values)


def _flat(path: _Path) -> str:
    """Return DCP's name of an entry."""
    return ".".join(map(str, path))
