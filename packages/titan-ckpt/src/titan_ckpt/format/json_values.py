"""JSON that round-trips exactly: encoding of values, flat names of nested keys, and strict parsing.

Tuples, which JSON lacks and optimizers use ("betas"), are written `{"$tuple": [...]}` and come back as tuples. Used by
`state` (what is saved), `format` and `convert` (what is read). Nothing here needs torch.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from titan_ckpt.errors import CheckpointError

TUPLE_KEY = "$tuple"
MOST_SAVED = 64  # levels of nesting that are saved
_MOST_BITS = 14_000  # of an integer: Python reads no more than 4,300 digits
_MOST_NESTED = 200  # levels of nesting that are read: more than MOST_SAVED, because a tuple takes two levels in JSON


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """Convert a value to JSON types without loss.

    Args:
        value: None, bool, int, float, str, or a list, tuple or dict of these.
        where: Where the value was found, for the message, e.g. `state["data"]`.
        depth: How many dicts and lists it is nested in.

    Returns:
        The value, with each tuple written as `{"$tuple": [...]}`.

    Raises:
        CheckpointError: If it holds anything else; the message names the place and the type.
    """
    if depth > MOST_SAVED:
        raise CheckpointError(f"{where[:80]}... is nested deeper than {MOST_SAVED} levels, or contains itself")
    # Exact types only: an IntEnum or a numpy float could be written, but would come back as something else.
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise CheckpointError(f"{where} is an integer of {value.bit_length()} bits: at most {_MOST_BITS} can be saved")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}[{place}]", depth + 1) for place, item in enumerate(value)]
        return items if type(value) is list else {TUPLE_KEY: items}
    if type(value) is dict:
        return {
            checked_key(key, where): encode(item, f"{where}[{json.dumps(key)}]", depth + 1)
            for key, item in value.items()
        }
    hint = "; tensors cannot be inside lists, put it into a dict under a name" if _is_tensor(value) else ""
    if isinstance(value, dict):
        hint = "; it would come back as a plain dict, so store dict(...) of it and convert it back when loading"
    raise CheckpointError(
        f"{where} is a {type_name(value)}: a checkpoint holds tensors in dicts, and None, bool, int, float, "
        f"str, lists, tuples and dicts of these{hint}"
    )


def decode(value: Any) -> Any:
    """Undo `encode`.

    Args:
        value: A value read from JSON.

    Returns:
        The value with its tuples restored.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {TUPLE_KEY}:
            return tuple(decode(item) for item in value[TUPLE_KEY])
        return {key: decode(item) for key, item in value.items()}
    return value


def check_values(value: Any) -> None:
    """Check that a value from JSON is one that `encode` can have written: valid tuples, limited nesting.

    Args:
        value: A value read from JSON.

    Raises:
        ValueError: If it is not.
    """
    for level in _levels(value):
        dicts = [item for item in level if isinstance(item, dict)]
        if any(TUPLE_KEY in item and (len(item) > 1 or not isinstance(item[TUPLE_KEY], list)) for item in dicts):
            raise ValueError(f"a {TUPLE_KEY} does not hold a tuple")


def check_nesting(value: Any) -> None:
    """Check that a value from JSON is not nested too deeply to be walked or printed.

    Raises:
        ValueError: If it is.
    """
    for _ in _levels(value):
        pass


def _levels(value: Any) -> Iterator[list[Any]]:
    """Yield the values of each level of nesting, the outermost first; raise ValueError if there are too many."""
    level = [value]
    for _ in range(_MOST_NESTED):
        yield level
        level = [inner for item in level if isinstance(item, dict) for inner in item.values()] + [
            inner for item in level if isinstance(item, list) for inner in item
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MOST_NESTED} levels")


def is_unicode(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8; strings from JSON and pickles may hold lone surrogates."""
    return text.isascii() or text.encode("utf-8", "replace").decode() == text


def key_of(path: tuple[str, ...]) -> str:
    """Return the flat name of a path through nested dicts, e.g. `model/a~1b` for `("model", "a/b")`.

    Raises:
        CheckpointError: If it cannot be encoded as UTF-8, as safetensors files and terminals require.
    """
    for part in path:
        if not is_unicode(part):
            raise CheckpointError(f"the name {part!r} cannot be written as UTF-8: rename it")
    return "/".join(part.replace("~", "~0").replace("/", "~1").replace("@", "~2") for part in path)


def path_of(key: str) -> list[str]:
    """Return the path of a flat name; undoes `key_of`."""
    return [part.replace("~2", "@").replace("~1", "/").replace("~0", "~") for part in key.split("/")]


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for `json.loads(object_pairs_hook=...)`; refuse duplicate keys and keys that are not Unicode.

    Raises:
        ValueError: If a key occurs twice or cannot be encoded as UTF-8.
    """
    for key, _ in pairs:
        if not is_unicode(key):
            raise ValueError(f"has the key {key!r}, which cannot be written as UTF-8")
    result = dict(pairs)
    if len(result) != len(pairs):
        duplicate, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"has the key {duplicate!r} twice")
    return result


def checked_key(key: Any, where: str) -> str:
    """Return a dict's key unchanged if it can be saved.

    Args:
        key: The key.
        where: The dict, for the message.

    Raises:
        CheckpointError: If it is not a string, not Unicode, or reserved.
    """
    if type(key) is not str:
        raise CheckpointError(
            f"{where} has the key {key!r}, a {type_name(key)}: keys must be strings, because JSON has no others. For "
            "optimizers, torch.distributed.checkpoint.state_dict.get_optimizer_state_dict names states by parameter"
        )
    if not is_unicode(key):
        raise CheckpointError(f"{where} has the key {key!r}, which cannot be written as UTF-8: rename it")
    if key == TUPLE_KEY:
        raise CheckpointError(f"{where} has the key {TUPLE_KEY!r}, which this format reserves: rename it")
    return key


def type_name(value: Any) -> str:
    """Return the name of a value's type as used in messages."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _is_tensor(value: Any) -> bool:
    return any((base.__module__, base.__name__) == ("torch", "Tensor") for base in type(value).__mro__)
