"""Formatting of text for the terminal; used by all commands."""

from math import floor, log2


def printable(text: str) -> str:
    """Escape control characters: names come from files that others made, and could send commands to the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def size(nbytes: int) -> str:
    """Return a number of bytes in the binary unit that fits, e.g. `1.50 GiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min(4, floor(log2(nbytes) / 10))
    return f"{nbytes / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def table(rows: list[list[str]]) -> str:
    """Return rows as left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
