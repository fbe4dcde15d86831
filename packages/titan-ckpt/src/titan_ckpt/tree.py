"""State dicts taken apart into tensors and JSON, and put together again.

A tensor's key is its path through the nested dicts, joined with "/": `model/layers.0.wq.weight`. Within one part of
the path "~" is written "~0" and "/" is written "~1", as JSON pointers do (RFC 6901), so no two paths share a key. "@",
which sets a chunk's offsets apart from its tensor's name, is written "~2".

What is not a tensor stays where it was, as JSON. Tuples, which JSON lacks and optimizers have ("betas"), are written
`{"$tuple": [...]}` and come back as tuples. Dicts that hold nothing but tensors leave no trace in the JSON: where
pipeline stages own different weights, the ranks' JSON is still the same.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from titan_ckpt.errors import CheckpointError

TUPLE_KEY = "$tuple"
_MOST_NESTED = 200  # levels that are read: more than _MOST_SAVED, for a tuple takes two in JSON
_MOST_SAVED = 64
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
                f"{_shown((name,))} is a {_type_name(part)}, which has no state_dict() and load_state_dict()"
            )
        nested = part.state_dict()
        if not isinstance(nested, dict):
            raise CheckpointError(f"{_shown((name,))}.state_dict() returned a {_type_name(nested)}; it must be a dict")
        rest = _cut_tensors(nested, (_checked_key(name, "state"),), tensors)
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


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """Turn a value into what JSON can hold exactly.

    Args:
        value: None, bool, int, float, str, or a list, tuple or dict of these.
        where: where it was found, for the message, e.g. `state["data"]`.
        depth: how many dicts and lists it lies in.

    Returns:
        The value with tuples written as `{"$tuple": [...]}`.

    Raises:
        CheckpointError: when it holds anything else; the message names the place and the type.
    """
    if depth > _MOST_SAVED:
        raise CheckpointError(f"{where[:80]}... is nested deeper than {_MOST_SAVED} levels, or holds itself")
    # Exact types only: an IntEnum or a numpy float would be written, but would come back as something else.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}[{place}]", depth + 1) for place, item in enumerate(value)]
        return items if type(value) is list else {TUPLE_KEY: items}
    if isinstance(value, dict):
        return {
            _checked_key(key, where): encode(item, f"{where}[{json.dumps(key)}]", depth + 1)
            for key, item in value.items()
        }
    hint = "; inside lists there can be no tensors, name it in a dict" if isinstance(value, torch.Tensor) else ""
    raise CheckpointError(
        f"{where} is a {_type_name(value)}: a checkpoint holds tensors in dicts, and None, bool, int, float, "
        f"str, lists, tuples and dicts of these{hint}"
    )


def decode(value: Any) -> Any:
    """Undo `encode`.

    Args:
        value: what was read from JSON.

    Returns:
        The value with its tuples.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {TUPLE_KEY}:
            return tuple(decode(item) for item in value[TUPLE_KEY])
        return {key: decode(item) for key, item in value.items()}
    return value


def check_values(value: Any) -> None:
    """See that a value from JSON is one that `encode` can have written: tuples are lists, and the nesting has an end.

    Args:
        value: what was read.

    Raises:
        ValueError: when it is not.
    """
    level = [value]
    for _ in range(_MOST_NESTED):
        dicts = [item for item in level if isinstance(item, dict)]
        if any(TUPLE_KEY in item and (len(item) > 1 or not isinstance(item[TUPLE_KEY], list)) for item in dicts):
            raise ValueError(f"a {TUPLE_KEY} is no tuple")
        level = [inner for item in dicts for inner in item.values()] + [
            inner for item in level if isinstance(item, list) for inner in item
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MOST_NESTED} levels")


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its dicts' keys.

    Args:
        value: what `json` can write.

    Returns:
        The digest in hexadecimal.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8: JSON and pickles may hold halves of characters that cannot."""
    return text.isascii() or text.encode("utf-8", "replace").decode() == text


def key_of(path: tuple[str, ...]) -> str:
    """Return the flat key of a path, e.g. `("model", "a/b")` gives `model/a~1b`.

    Raises:
        CheckpointError: when it cannot be written as UTF-8, which safetensors files and terminals want.
    """
    for part in path:
        if not is_unicode(part):
            raise CheckpointError(f"the name {part!r} cannot be written as UTF-8: rename it")
    return "/".join(part.replace("~", "~0").replace("/", "~1").replace("@", "~2") for part in path)


def parts_of(key: str) -> list[str]:
    """Return the path of a flat key."""
    return [part.replace("~2", "@").replace("~1", "/").replace("~0", "~") for part in key.split("/")]


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
    if len(path) > _MOST_SAVED:
        raise CheckpointError(f"{where[:80]}... is nested deeper than {_MOST_SAVED} levels, or holds itself")
    kept = {key: _cut_tensors(item, (*path, _checked_key(key, where)), tensors) for key, item in value.items()}
    kept = {key: item for key, item in kept.items() if item is not _CUT}
    return _CUT if value and not kept else kept


def _checked_key(key: Any, where: str) -> str:
    if type(key) is not str:
        raise CheckpointError(
            f"{where} has the key {key!r}, a {_type_name(key)}: keys must be strings, for JSON would make them so. For "
            "optimizers, torch.distributed.checkpoint.state_dict.get_optimizer_state_dict names states by parameter"
        )
    if not is_unicode(key):
        raise CheckpointError(f"{where} has the key {key!r}, which cannot be written as UTF-8: rename it")
    if key == TUPLE_KEY:
        raise CheckpointError(f"{where} has the key {TUPLE_KEY!r}, which this format keeps for itself: rename it")
    return key


def _shown(path: tuple[str, ...]) -> str:
    return "state" + "".join(f"[{json.dumps(part)}]" for part in path)


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
