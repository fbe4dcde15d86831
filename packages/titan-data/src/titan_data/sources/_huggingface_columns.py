"""The text column of a Hugging Face dataset, which may be a path into nested columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from titan_data.errors import DataError
from titan_data.files.text_key import MISSING, find_value, list_keys


def check_column(dataset: Any, text_key: str, path: str) -> None:
    """Check that the records have the text column; some streams show their columns only in the first record."""
    columns = dataset.column_names
    if columns is None:
        first: Mapping[str, Any] | None = next(iter(dataset), None)
        if first is None:
            return  # an empty stream: the loader reports it
        columns = list(first)
    if _first_key(text_key, columns) is None:
        raise DataError(f"{path!r} has no column {text_key!r}; set text_key to one of: {', '.join(sorted(columns))}")


def _first_key(text_key: str, columns: Sequence[str]) -> str | None:
    """Return the column that a key, or the beginning of a path of keys, names."""
    named = [column for column in columns if text_key == column or text_key.startswith(f"{column}.")]
    return max(named, key=len, default=None)


def top_column(dataset: Any, text_key: str) -> str:
    """Return the column that holds the text, or the objects with it."""
    columns = dataset.column_names
    return (None if columns is None else _first_key(text_key, columns)) or text_key.partition(".")[0]


def text_of(record: Mapping[str, Any], text_key: str) -> str:
    """Return the text of a record."""
    value = find_value(record, text_key)
    if value is None:
        return ""
    if value is MISSING:
        raise DataError(f"a record has no {text_key!r}; set text_key to one of: {', '.join(list_keys(record))}")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"column {text_key!r} is of type {kind}, not text: set text_key to a column of strings")
    return value
