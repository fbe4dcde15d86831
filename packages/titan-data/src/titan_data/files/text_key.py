"""`find_text`: the text of a record by its key, which may be a path into nested objects ("meta.text")."""

from collections.abc import Mapping
from typing import Any, Final


class Missing:
    """Type of `MISSING`."""


MISSING: Final = Missing()
"""What `find_value` returns where there is no such key."""


def find_value(record: Mapping[str, Any], key: str) -> Any:
    """Return the value at a key of nested objects.

    Args:
        record: The record.
        key: A key, or a path of keys joined by dots. A key that itself contains dots comes first.

    Returns:
        The value; None if an object on the path is null; `MISSING` if there is no such key.
    """
    if key in record:
        return record[key]
    for i, character in enumerate(key):
        if character == "." and key[:i] in record:
            inner = record[key[:i]]
            if inner is None:
                return None
            if isinstance(inner, Mapping):
                return find_value(inner, key[i + 1 :])
    return MISSING


def list_keys(record: Mapping[str, Any]) -> list[str]:
    """List the keys of a record, those of nested objects as paths."""
    keys: list[str] = []
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            keys += [f"{key}.{inner}" for inner in list_keys(value)]
        else:
            keys.append(key)
    return keys
