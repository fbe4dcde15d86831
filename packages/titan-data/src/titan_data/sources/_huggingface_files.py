"""Which local files a Hugging Face dataset is made of, found before `datasets` looks for them."""

import glob
from collections.abc import Sequence
from pathlib import Path

from titan_data.errors import DataError

# What `datasets` reads from files of one's own. Any other `path` is a local folder or the name of a Hub dataset.
FILE_FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})


def is_folder(path: str) -> bool:
    """Whether `path` means a folder on this machine, be it there or not."""
    return path not in FILE_FORMATS and (path.startswith(("/", ".", "~")) or Path(path).is_dir())


def local_files(path: str, patterns: Sequence[str] | None) -> list[Path] | None:
    """Find the local files that are asked for, in their order; None where they are not on this machine.

    `datasets` reports a missing file many calls deep, and some only after it has tried the Hub; so look here first.
    """
    if path in FILE_FORMATS:
        folder = Path()
        if not patterns:
            raise DataError(f"format {path!r} needs data_files: the paths of the files to read")
    elif is_folder(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise DataError(f"there is no folder {path}")
        if patterns is None:
            found = sorted(file for file in folder.rglob("*") if file.is_file())
            return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]
    else:
        return None
    if any("://" in pattern for pattern in patterns):
        return None
    return [file for pattern in patterns for file in _expand(folder, pattern)]


def _expand(folder: Path, pattern: str) -> list[Path]:
    """Turn one path or glob pattern into the files it means, sorted."""
    whole = folder / Path(pattern).expanduser()
    found = [whole] if whole.exists() else [Path(match) for match in glob.glob(str(whole), recursive=True)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(f"there is no {'file that matches' if glob.has_magic(pattern) else 'file'} {whole}")
    return files
