"""State dicts taken apart into tensors and JSON, and put together again.

A tensor's key is its path through the nested dicts, joined with "/": `model/layers.0.wq.weight`. Within one part of
the path "~" is written "~0" and "/" is written "~1", as JSON pointers do (RFC 6901), so no two paths share a key. "@",
which sets a chunk's offsets apart from its tensor's name, is written "~2".

What is not a tensor stays where it was, as JSON. Dicts that hold nothing but tensors leave no trace in it: where
pipeline stages own different weights, the ranks' JSON is still the same.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import MOST_SAVED, checked_key, decode, encode, key_of, parts_of, type_name

_CUT = object()  # stands for a branch of which nothing but tensors was left


@runtime_checkable
class Stateful(Protocol):
    """What can be saved: anything with a state dict.

    The state is a dict, nested as you like, whose keys are strings and whose leaves are tensors (plain or DTensor)
    or JSON values: None, bool, int, float, str, and lists, tuples and dicts of these.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the present state; its tensors may be the live ones."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take back a state of the same nesting."""
        ...


def split(state: Mapping[str, Stateful]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Take the state dicts of `state` apart.

    Args:
        state: the objects by their top-level names.

    Returns:
        The tensors by flat key, and the JSON by top-level name (absent where there are tensors alone).

    Raises:
        CheckpointError: when something in it can be saved neither as a tensor nor as JSON.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, part in state.items():
        if not isinstance(part, Stateful):
            raise CheckpointError(
                f"{_shown((name,))} is a {type_name(part)}, which has no state_dict() and load_state_dict()"
            )
        nested = part.state_dict()
        if not isinstance(nested, dict):
            raise CheckpointError(f"{_shown((name,))}.state_dict() returned a {type_name(nested)}; it must be a dict")
        rest = _cut_tensors(nested, (checked_key(name, "state"),), tensors)
        if rest is not _CUT:
            values[name] = rest
    return tensors, values


def merge(name: str, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Put one top-level entry together again.

    Args:
        name: the entry.
        values: the JSON of all entries, as `split` made it.
        tensors: the tensors by flat key; those of other entries are passed over.

    Returns:
        The entry's state dict.

    Raises:
        CheckpointError: when a tensor's place is taken by a JSON value.
    """
    merged: dict[str, Any] = decode(values.get(name, {}))
    for key, tensor in tensors.items():
        first, *path = parts_of(key)
        if first != name:
            continue
        place = merged
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise CheckpointError(f"the checkpoint holds both the tensor {key!r} and a value above it")
        place[path[-1]] = tensor
    return merged


def _cut_tensors(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of `value` into `tensors`; return what is left as JSON, or _CUT when nothing is."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout is not torch.strided:
            kind = "on the meta device, without values" if value.is_meta else f"of layout {value.layout}"
            raise CheckpointError(f"{_shown(path)} is a tensor {kind}: give it memory (dense, strided) first")
        tensors[key_of(path)] = value
        return _CUT
    if not isinstance(value, dict):
        return encode(value, _shown(path), len(path))
    where = _shown(path)
    if len(path) > MOST_SAVED:
        raise CheckpointError(f"{where[:80]}... is nested deeper than {MOST_SAVED} levels, or holds itself")
    kept = {key: _cut_tensors(item, (*path, checked_key(key, where)), tensors) for key, item in value.items()}
    kept = {key: item for key, item in kept.items() if item is not _CUT}
    return _CUT if value and not kept else kept


def _shown(path: tuple[str, ...]) -> str:
    return "state" + "".join(f"[{json.dumps(part)}]" for part in path)
