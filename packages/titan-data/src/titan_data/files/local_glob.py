"""Patterns on this machine's file systems: folders behind links are entered, and nothing is left out in silence.

fsspec's own `glob` does not enter linked folders, drops links to files that do not exist, and skips folders that it may
not read. `glob.find_files` calls this for local patterns.
"""

import fnmatch
import os
import re
from collections.abc import Iterator

from titan_data.errors import DataError


def glob_local(pattern: str) -> list[str]:
    """Find the files and folders that match an absolute pattern.

    Args:
        pattern: A path with forward slashes; a component may have `*`, `?` and `[…]`, or be `**`: any number of
            folders. As the last component, `**` is any file below.

    Returns:
        Their paths, each once, in no particular order. With `**`, a folder that can be reached on several paths is
        entered on one.

    Raises:
        DataError: If a folder cannot be read, a link that matches points to nothing, or the pattern is invalid.
    """
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _is_magic(part))
    rest = [*parts[first:], "*"] if parts[-1] == "**" else parts[first:]
    if invalid := [part for part in rest if "**" in part and part != "**"]:
        raise DataError(f"{pattern}: ** must be a component of its own, not part of {invalid[0]!r}")
    return [*dict.fromkeys(_matches("/".join(parts[:first]) or "/", rest))]


def check_link(path: str) -> None:
    """Check that a path is not a link to nothing.

    Raises:
        DataError: If it is.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: restore the file, or remove the link"
        )


def _is_magic(part: str) -> bool:
    return any(character in part for character in "*?[")


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    if parts[0] == "**":
        for below in _folders_below(folder):
            yield from _matches(below, parts[1:])
        return
    if not _is_magic(parts[0]):
        found = [os.path.join(folder, parts[0])]
    else:
        matches = re.compile(fnmatch.translate(parts[0])).match
        found = [entry.path for entry in _list(folder) if matches(entry.name)]
    for path in found:
        if len(parts) > 1:
            if os.path.isdir(path):
                yield from _matches(path, parts[1:])
        elif os.path.exists(path):
            yield path
        else:
            check_link(path)


def _folders_below(folder: str) -> Iterator[str]:
    """List a folder and all below it, those behind links last, so that a folder is entered on its own path."""
    entered: set[str] = set()
    waiting = [folder]
    while waiting:
        links: list[str] = []
        while waiting:
            path = waiting.pop()
            if (real := os.path.realpath(path)) in entered:
                continue
            entered.add(real)
            yield path
            for entry in _list(path):
                if entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(entry.path)
        waiting = sorted(links, reverse=True)


def _list(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        return []
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from None
