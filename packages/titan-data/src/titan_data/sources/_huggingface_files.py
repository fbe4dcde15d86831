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
            found = sorted(file for file in folder.rglob("*") if file.is_file())
            return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]
    else:
        return None
    if any("://" in pattern for pattern in patterns):
        return None
    return [file for pattern in patterns for file in _expand(folder, pattern)]


def _expand(folder: Path, pattern: str) -> list[Path]:
    """Find the files that match one path or glob pattern, sorted."""
    full = folder / Path(pattern).expanduser()
    # glob.glob, not Path.glob: it accepts absolute patterns and skips hidden files.
    found = [full] if full.exists() else [Path(match) for match in glob.glob(str(full), recursive=True)]  # noqa: PTH207
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(f"no file matches {full}" if glob.has_magic(pattern) else f"file {full} does not exist")
    return files
