"""Formatting of text for the terminal; used by all commands."""

import json
from math import isfinite
from typing import Any


def size(nbytes: int) -> str:
    """Return a number of bytes in the binary unit that fits, e.g. `1.50 GiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min(4, (nbytes.bit_length() - 1) // 10)
    return f"{nbytes / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def table(rows: list[list[str]]) -> str:
    """Return rows as left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def to_json(value: Any) -> str:
    """Return a value as JSON. NaN and infinite numbers, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
