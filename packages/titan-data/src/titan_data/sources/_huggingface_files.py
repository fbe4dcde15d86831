"""Find the local files of a Hugging Face dataset before `datasets` looks for them, for better errors."""

import glob
from collections.abc import Sequence
from pathlib import Path

from titan_data.errors import DataError

# Formats of local files in `datasets`. Any other `path` is a local folder or the name of a Hub dataset.
FILE_FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})


def is_folder(path: str) -> bool:
    """Whether `path` means a folder on this machine, even if it does not exist."""
    return path not in FILE_FORMATS and (path.startswith(("/", ".", "~")) or Path(path).is_dir())


def local_files(path: str, patterns: Sequence[str] | None) -> list[Path] | None:
    """Find the local files of a dataset, in order; None if they are not on this machine.

    `datasets` reports a missing file many calls deep, and some only after it has tried the Hub.

    Raises:
        DataError: If a file or folder does not exist, or a format has no `data_files`.
    """
    if path in FILE_FORMATS:
        folder = Path()
        if not patterns:
            raise DataError(f"format {path!r} needs data_files: the paths of the files")
    elif is_folder(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise DataError(f"folder {path} does not exist")
        if patterns is None:
            entries = sorted(folder.rglob("*"))
            for entry in entries:
                _check_link(entry)
            found = [entry for entry in entries if entry.is_file()]
            return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]
    else:
        return None
    if any("://" in pattern for pattern in patterns):
        return None
    return [file for pattern in patterns for file in _expand(folder, pattern)]


def _check_link(entry: Path, *, folders: bool = False) -> None:
    """Refuse links that would be left out in silence: those to nothing, and those to folders unless `folders`."""
    if entry.is_symlink() and not entry.exists():
        raise DataError(
            f"{entry} is a link to {entry.readlink()}, which does not exist: restore it, or remove the link"
        )
    if entry.is_symlink() and entry.is_dir() and not folders:
        raise DataError(
            f"{entry} is a link to a folder, which `datasets` does not enter: name its files with data_files, such as "
            "data_files='**/*.jsonl'"
        )


def _expand(folder: Path, pattern: str) -> list[Path]:
    """Find the files that match one path or glob pattern, sorted."""
    full = folder / Path(pattern).expanduser()
    # glob.glob, not Path.glob: it accepts absolute patterns and skips hidden files.
    found = [full] if full.exists() else [Path(match) for match in glob.glob(str(full), recursive=True)]  # noqa: PTH207
    for file in found:
        _check_link(file, folders=True)
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(f"no file matches {full}" if glob.has_magic(pattern) else f"file {full} does not exist")
    return files
