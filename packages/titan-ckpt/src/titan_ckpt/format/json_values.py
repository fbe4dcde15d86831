"""JSON that gives back what it was given: values, the names in them, and the reading of files that nobody vouches for.

Tuples, which JSON lacks and optimizers have ("betas"), are written `{"$tuple": [...]}` and come back as tuples. Nothing
here needs torch.
"""

import json
from collections import Counter
from typing import Any

from titan_ckpt.errors import CheckpointError

TUPLE_KEY = "$tuple"
MOST_SAVED = 64  # levels of nesting
_MOST_NESTED = 200  # levels that are read: more than MOST_SAVED, for a tuple takes two in JSON


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
    if depth > MOST_SAVED:
        raise CheckpointError(f"{where[:80]}... is nested deeper than {MOST_SAVED} levels, or holds itself")
    # Exact types only: an IntEnum or a numpy float would be written, but would come back as something else.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}[{place}]", depth + 1) for place, item in enumerate(value)]
        return items if type(value) is list else {TUPLE_KEY: items}
    if isinstance(value, dict):
        return {
            checked_key(key, where): encode(item, f"{where}[{json.dumps(key)}]", depth + 1)
            for key, item in value.items()
        }
    hint = "; inside lists there can be no tensors, name it in a dict" if _is_tensor(value) else ""
    raise CheckpointError(
        f"{where} is a {type_name(value)}: a checkpoint holds tensors in dicts, and None, bool, int, float, "
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


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict as `json` asks for it (`object_pairs_hook`); refuse keys that occur twice, or are no text."""
    for key, _ in pairs:
        if not is_unicode(key):
            raise ValueError(f"has the key {key!r}, which cannot be written as UTF-8")
    made = dict(pairs)
    if len(made) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"has the key {twice!r} twice")
    return made


def checked_key(key: Any, where: str) -> str:
    """Return a dict's key as it is.

    Args:
        key: the key.
        where: which dict, for the message.

    Raises:
        CheckpointError: when it is no text, or none that can be a key here.
    """
    if type(key) is not str:
        raise CheckpointError(
            f"{where} has the key {key!r}, a {type_name(key)}: keys must be strings, for JSON would make them so. For "
            "optimizers, torch.distributed.checkpoint.state_dict.get_optimizer_state_dict names states by parameter"
        )
    if not is_unicode(key):
        raise CheckpointError(f"{where} has the key {key!r}, which cannot be written as UTF-8: rename it")
    if key == TUPLE_KEY:
        raise CheckpointError(f"{where} has the key {TUPLE_KEY!r}, which this format keeps for itself: rename it")
    return key


def type_name(value: Any) -> str:
    """Return how a value's type is called in messages."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _is_tensor(value: Any) -> bool:
    return any((base.__module__, base.__name__) == ("torch", "Tensor") for base in type(value).__mro__)
