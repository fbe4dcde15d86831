"""State dicts split into tensors and JSON values, and merged again.

A tensor's name is its path through the nested dicts, joined with "/": `model/layers.0.wq.weight`. Within one part of
the path "~" is written "~0" and "/" is written "~1", as in JSON pointers (RFC 6901), so no two paths share a name. "@",
which separates a tensor's name from a chunk's offsets, is written "~2".

Values that are not tensors keep their place in the nesting. An OrderedDict of tensors, as modules return it, counts as
a dict; other subclasses of dict are refused. Dicts that hold only tensors leave no trace there: where
pipeline stages own different weights, the ranks' values are still the same.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import MOST_SAVED, checked_key, decode, encode, key_of, path_of, type_name

_ONLY_TENSORS = object()  # stands for a branch that held nothing but tensors


@runtime_checkable
class Stateful(Protocol):
    """What can be saved: any object with a state dict.

    The state is a dict, nested at will, whose keys are strings and whose leaves are tensors (regular or DTensor) or
    JSON
    values: None, bool, int, float, str, and lists, tuples and dicts of these.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the current state; its tensors may be the live ones."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Restore a state of the same nesting."""
        ...


def split(state: Mapping[str, Stateful]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split the state dicts of `state` into tensors and values.

    Args:
        state: The objects by top-level name.

    Returns:
        The tensors by flat name, and the encoded values by top-level name (absent where there are only tensors).

    Raises:
        CheckpointError: If something in it can be saved neither as a tensor nor as JSON.
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
        rest = _take_tensors(nested, (checked_key(name, "state"),), tensors)
        if rest is not _ONLY_TENSORS:
            values[name] = rest
    return tensors, values


def merge(name: str, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Rebuild the state dict of one top-level entry.

    Args:
        name: The entry.
        values: The encoded values of all entries, as returned by `split`.
        tensors: The tensors by flat name; those of other entries are ignored.

    Returns:
        The entry's state dict.

    Raises:
        CheckpointError: If a value is stored where a tensor's path leads through.
    """
    merged: dict[str, Any] = decode(values.get(name, {}))
    for key, tensor in tensors.items():
        first, *path = path_of(key)
        if first != name:
            continue
        place = merged
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise CheckpointError(f"the checkpoint holds both the tensor {key!r} and a value above it")
        place[path[-1]] = tensor
    return merged


def _take_tensors(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of `value` into `tensors`; return the rest encoded, or _ONLY_TENSORS if nothing is left."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout is not torch.strided:
            kind = "on the meta device, without data" if value.is_meta else f"of layout {value.layout}"
            raise CheckpointError(f"{_shown(path)} is a tensor {kind}: only dense tensors with data can be saved")
        tensors[key_of(path)] = value
        return _ONLY_TENSORS
    if not isinstance(value, dict) or not (type(value) is dict or _is_module_state(value, path)):
        return encode(value, _shown(path), len(path))
    where = _shown(path)
    if len(path) > MOST_SAVED:
        raise CheckpointError(f"{where[:80]}... is nested deeper than {MOST_SAVED} levels, or contains itself")
    kept = {key: _take_tensors(item, (*path, checked_key(key, where)), tensors) for key, item in value.items()}
    kept = {key: item for key, item in kept.items() if item is not _ONLY_TENSORS}
    return _ONLY_TENSORS if value and not kept else kept


def _is_module_state(value: dict[Any, Any], path: tuple[str, ...]) -> bool:
    """Return whether a dict is one as `nn.Module.state_dict` returns: an OrderedDict that holds tensors.

    Every `load_state_dict` takes a plain dict instead, so it is treated as one. Other subclasses of dict would come
    back as something else than they were, and are refused.
    """
    return type(value) is OrderedDict and (len(path) == 1 or any(_holds_tensors(item) for item in value.values()))


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict) and depth < MOST_SAVED:
        return any(_holds_tensors(item, depth + 1) for item in value.values())
    return isinstance(value, torch.Tensor)


def _shown(path: tuple[str, ...]) -> str:
    return "state" + "".join(f"[{json.dumps(part)}]" for part in path)
