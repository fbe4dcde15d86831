"""From patterns to files: in one order on every machine, and a message that helps where there are none."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec

from titan_data.errors import DataError
from titan_data.files.retry import Retry, describe_error, may_pass, within
from titan_data.files.storage import DataFile, describe, open_filesystem, without_query

_SHOWN = 5  # files named where a pattern finds none
_THREADS = 16  # requests under way at a time


def find_files(
    patterns: str | Path | Sequence[str | Path], *, options: Mapping[str, Any] | None = None, retry: Retry | None = None
) -> list[DataFile]:
    """Find the files that patterns mean.

    Args:
        patterns: paths or URLs, with `*`, `?`, `[…]` and `**` (any number of folders); `~` is the home folder. Files
            whose names, or whose folders' names, begin with a dot are found only where they are named in full.
        options: arguments of fsspec's file system, such as credentials.
        retry: how often to try where the storage fails.

    Returns:
        The files, those of each pattern sorted by their paths with numbers in numerical order (part-2 before
        part-10), the patterns in the order given. A file that several patterns find comes once.

    Raises:
        DataError: a pattern finds nothing, names a folder, or the storage cannot be reached.
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
    """Sort folder by folder, and numbers within names as numbers."""
    split = [re.split("([0-9]+)", name) for name in path.split("/")]  # the odd parts are the numbers
    return [[int(part) if i % 2 else part for i, part in enumerate(parts)] for parts in split]


def source_name(pattern: str | Path) -> str:
    """Make a source's name of a pattern: the last folder before the first wildcard, and all from there on."""
    path = without_query(os.fspath(pattern)).replace(os.sep, "/")
    parts = [part for part in (path.partition("://")[2] or path).split("/") if part]
    first = next((i for i, part in enumerate(parts) if _is_magic(part)), None)
    return "/".join(parts[-1:] if first is None else parts[max(first - 1, 0) :])


def _is_magic(path: str) -> bool:
    return any(character in path for character in "*?[")


def _expand(pattern: str, options: Mapping[str, Any], retry: Retry) -> list[DataFile]:
    remote = "://" in pattern or "::" in pattern
    url = pattern if remote else os.path.abspath(os.path.expanduser(pattern))
    filesystem, path = open_filesystem(url, options)
    # Web addresses have a "?" that is no wildcard.
    magic = "*" in path if url.startswith(("http://", "https://")) else _is_magic(path)
    local = isinstance(filesystem, fsspec.get_filesystem_class("file"))

    def lookup(path: str) -> Mapping[str, Any] | None:
        try:
            info: Mapping[str, Any] = filesystem.info(path)
            return info
        except FileNotFoundError:
            return None

    ask = _Asker(local, retry, without_query(pattern))
    info = ask(lambda: lookup(path))
    if info is not None and info.get("type") != "directory":
        magic, infos = False, {path: info}
    elif magic:
        root = _literal_folder(path, magic)
        matches = [match for match in ask(lambda: filesystem.glob(path)) if not _is_hidden(match, path, root)]
        with ThreadPoolExecutor(_THREADS) as pool:
            looked_up = pool.map(lambda match: ask(lambda: lookup(match)), matches)
        infos = {
            m: i for m, i in zip(matches, looked_up, strict=True) if i is not None and i.get("type") != "directory"
        }
    else:
        infos = {}
    if not infos:
        raise DataError(_nothing_found(filesystem, pattern, path, folder=info is not None))
    root = _literal_folder(path, magic)
    files = []
    for match in sorted(infos, key=lambda match: (natural_key(match), match)):
        size, version = describe(infos[match])
        plain = without_query(match)
        label = plain if local else without_query(str(filesystem.unstrip_protocol(match)))
        files.append(DataFile(plain[len(root) :].lstrip("/"), label, match, url, dict(options), local, size, version))
    return files


class _Asker:
    """Asks the storage something, again where it fails."""

    def __init__(self, local: bool, retry: Retry, pattern: str) -> None:
        self._local, self._retry, self._pattern = local, retry, pattern

    def __call__(self, question: Any) -> Any:
        failures = 0
        while True:
            try:
                return question() if self._local else within(self._retry.stall, question)
            except Exception as error:
                failures += 1
                if not may_pass(error) or failures == self._retry.attempts:
                    times = f" after {failures} attempts" if failures > 1 else ""
                    raise DataError(f"{self._pattern} cannot be looked up{times}: {describe_error(error)}") from error
            self._retry.wait(failures)


def _is_hidden(path: str, pattern: str, root: str) -> bool:
    """Whether a dot is in front of a name below `root`, and the pattern asks for no such names."""
    return "/." in path[len(root) :] and "/." not in pattern[len(root) :]


def _literal_folder(path: str, magic: bool) -> str:
    """Return the folder that a pattern's files are all in, as far as it is written without wildcards."""
    if not magic:
        return without_query(path).rpartition("/")[0]
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _is_magic(part))
    return "/".join(parts[:first])


def _nothing_found(filesystem: Any, pattern: str, path: str, *, folder: bool) -> str:
    """Say what there is instead of what was looked for."""
    pattern = without_query(pattern)
    if folder:
        return f"{pattern} is a folder: name its files, such as {pattern.rstrip('/')}/**/*.jsonl"
    message = f"there is no file {'that matches ' if _is_magic(pattern) else ''}{pattern}"
    if path.startswith(("http://", "https://")):
        return message
    nearest = path
    while (parent := nearest.rpartition("/")[0]) and parent != nearest:
        nearest = parent
        try:
            names = sorted(entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(nearest, detail=False))
        except Exception:  # a message in the making: whatever cannot be listed is passed over
            continue
        close = difflib.get_close_matches(path[len(nearest) :].split("/")[1], names, n=_SHOWN, cutoff=0.6)
        shown = close or names[:_SHOWN]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        return f"{message}; in {nearest} there is {', '.join(shown) + more if names else 'nothing'}"
    return message


def _with_unique_names(files: Iterable[DataFile]) -> list[DataFile]:
    """Number files of one name (from several folders), as a fingerprint tells files apart by their names."""
    seen: dict[str, int] = {}
    unique = []
    for file in files:
        times = seen[file.name] = seen.get(file.name, 0) + 1
        unique.append(file if times == 1 else replace(file, name=f"{file.name} ({times})"))
    return unique
