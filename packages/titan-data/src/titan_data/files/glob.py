"""From patterns to files: in the same order on every machine, with a helpful message if there are none.

fsspec expands the patterns. What it does not do is here: skip hidden files, sort numbers in numerical order, retry,
name files relative to the pattern's folder, and suggest what there is when nothing matches.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from titan_data.errors import DataError
from titan_data.files.local_glob import check_link, glob_local
from titan_data.files.retry import AttemptsFailedError, Retry, call_with_retries, within
from titan_data.files.storage import DataFile, open_filesystem, size_and_version, without_query

T = TypeVar("T")

_SHOWN = 5  # files named in the message if a pattern matches nothing
_THREADS = 16  # concurrent requests


def find_files(
    patterns: str | Path | Sequence[str | Path], *, options: Mapping[str, Any] | None = None, retry: Retry | None = None
) -> list[DataFile]:
    """Find the files that match patterns.

    Args:
        patterns: Paths or URLs, with `*`, `?`, `[…]` and `**` (any number of folders, also behind links); `~` is the
            home folder. Files whose names, or whose folders' names, begin with a dot are found only if they are named
            in full.
        options: Arguments of fsspec's file system, such as credentials.
        retry: How often to retry when storage fails.

    Returns:
        The files, those of each pattern sorted by path with numbers in numerical order (part-2 before part-10), the
        patterns in the order given. A file that matches several patterns is listed once.

    Raises:
        DataError: If a pattern matches nothing or names a folder, a link that it matches points to nothing, or the
            storage cannot be reached.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    if not patterns:
        raise DataError("no files to read: give at least one path or pattern")
    retry = retry or Retry()
    found: dict[tuple[str, str], DataFile] = {}
    for pattern in patterns:
        for file in _expand(os.fspath(pattern), options or {}, retry):
            found.setdefault((file.label, file.path), file)
    return _with_unique_names(found.values())


def natural_key(path: str) -> list[list[str | int]]:
    """Sort key of a path: folder by folder, numbers within names as numbers."""
    split = [re.split("([0-9]+)", name) for name in path.split("/")]  # the odd parts are the numbers
    return [[int(part) if i % 2 else part for i, part in enumerate(parts)] for parts in split]


def source_name(pattern: str | Path) -> str:
    """Derive a source's name from a pattern: the last folder before the first wildcard, and everything after it."""
    path = without_query(os.fspath(pattern)).replace(os.sep, "/")
    parts = [part for part in (path.partition("://")[2] or path).split("/") if part]
    first = next((i for i, part in enumerate(parts) if has_wildcard(part)), None)
    return "/".join(parts[-1:] if first is None else parts[max(first - 1, 0) :])


def has_wildcard(path: str | Path) -> bool:
    """Whether a path is a pattern."""
    return any(character in os.fspath(path) for character in "*?[")


def _is_remote(pattern: str) -> bool:
    """Whether a pattern is a URL; "::" joins file systems only after the name of one (simplecache::/a/b)."""
    if "://" in pattern:
        return True
    first, joined, _ = pattern.partition("::")
    return bool(joined) and first in fsspec.available_protocols() and not os.path.lexists(pattern)


def _expand(pattern: str, options: Mapping[str, Any], retry: Retry) -> list[DataFile]:
    """Find the files of one pattern."""
    remote = _is_remote(pattern)
    # fsspec expands `~` but keeps `..`: one file under two paths would be read twice.
    url = pattern if remote else os.path.abspath(os.path.expanduser(pattern))
    filesystem, path = open_filesystem(url, options)
    local = isinstance(filesystem, fsspec.get_filesystem_class("file"))

    def request(function: Callable[[], T]) -> T:
        try:
            return call_with_retries(function if local else lambda: within(retry.stall, function), retry)
        except AttemptsFailedError as failed:
            times = f" after {failed.failures} attempts" if failed.failures > 1 else ""
            raise DataError(f"{without_query(pattern)} cannot be accessed{times}: {failed}") from failed.error

    def lookup(path: str) -> Mapping[str, Any] | None:
        try:
            info: Mapping[str, Any] = filesystem.info(path)
            return info
        except FileNotFoundError:
            return None

    # In web addresses a "?" is not a wildcard.
    magic = "*" in path if url.startswith(("http://", "https://")) else has_wildcard(path)
    info = request(lambda: lookup(path))
    if local and info is None:
        check_link(path)
    infos: dict[str, Mapping[str, Any]] = {}
    if info is not None and info.get("type") != "directory":
        magic, infos = False, {path: info}
    elif magic:
        root = _literal_folder(path, magic=True)
        expanded = request(lambda: glob_local(path) if local else filesystem.glob(path))
        matches = [match for match in expanded if not _is_hidden(match, path, root)]
        # Not `glob(detail=True)`: some listings have another version of a file, or no size, than `info` has later.
        with ThreadPoolExecutor(_THREADS) as pool:
            looked_up = pool.map(lambda match: request(lambda: lookup(match)), matches)
        pairs = zip(matches, looked_up, strict=True)
        infos = {match: info for match, info in pairs if info is not None and info.get("type") != "directory"}
    if not infos:
        raise DataError(_nothing_found(filesystem, pattern, path, is_folder=info is not None))
    root = _literal_folder(path, magic=magic)
    files = []
    for match in sorted(infos, key=lambda match: (natural_key(match), match)):
        size, version = size_and_version(infos[match])
        plain = without_query(match)
        label = plain if local else without_query(str(filesystem.unstrip_protocol(match)))
        files.append(DataFile(plain[len(root) :].lstrip("/"), label, match, url, dict(options), local, size, version))
    return files


def _is_hidden(path: str, pattern: str, root: str) -> bool:
    """Whether a name below `root` begins with a dot, and the pattern does not ask for such names."""
    return "/." in path[len(root) :] and "/." not in pattern[len(root) :]


def _literal_folder(path: str, *, magic: bool) -> str:
    """Return the part of a pattern before its first wildcard: a folder that contains all its files."""
    if not magic:
        return without_query(path).rpartition("/")[0]
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if has_wildcard(part))
    return "/".join(parts[:first])


def _nothing_found(filesystem: Any, pattern: str, path: str, *, is_folder: bool) -> str:
    """Return the message for a pattern that matches nothing, with the names that are there instead."""
    pattern = without_query(pattern)
    if is_folder:
        return f"{pattern} is a folder: name its files, such as {pattern.rstrip('/')}/**/*.jsonl"
    message = f"no file matches {pattern}" if has_wildcard(pattern) else f"file {pattern} does not exist"
    if path.startswith(("http://", "https://")):
        return message
    nearest = path
    while (parent := nearest.rpartition("/")[0]) and parent != nearest:
        nearest = parent
        try:
            names = sorted(entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(nearest, detail=False))
        except Exception:  # this is only for the message: a folder that cannot be listed is skipped
            continue
        close = difflib.get_close_matches(path[len(nearest) :].split("/")[1], names, n=_SHOWN, cutoff=0.6)
        shown = close or names[:_SHOWN]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        return f"{message}; {nearest} contains {', '.join(shown) + more if names else 'nothing'}"
    return message


def _with_unique_names(files: Iterable[DataFile]) -> list[DataFile]:
    """Number files of the same name (from several folders), as a fingerprint identifies files by name."""
    files = list(files)
    own = {file.name for file in files}
    seen: dict[str, int] = {}
    unique = []
    for file in files:
        times = seen[file.name] = seen.get(file.name, 0) + 1
        if times > 1:
            while (name := f"{file.name} ({times})") in own:  # which a file is called by itself
                times = seen[file.name] = times + 1
            file = replace(file, name=name)
        unique.append(file)
    return unique
