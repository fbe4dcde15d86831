"""Documents out of Hugging Face `datasets`: from the Hub or from local files, in memory maps or as a stream.

Needs the extra `titan-data[huggingface]`. Code that comes with a dataset is never run.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_data.errors import DataError
from titan_data.sources import Source

# What `datasets` reads from files of one's own. Any other `path` is a local folder or the name of a Hub dataset.
_FILE_FORMATS = frozenset({"arrow", "csv", "json", "parquet", "text"})


def load_huggingface(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    text_key: str = "text",
    streaming: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Source:
    """Open a dataset as a source.

    The fingerprint is made of what is asked for, of the names and sizes of local files (not their folder: they may
    be moved) and, unless streaming, of the number of rows. A Hub dataset may change under its name: give its
    `revision` where that matters.

    Args:
        path: name of a Hub dataset, a local folder, or the format ("json", "parquet", "text", "csv", "arrow") of
            `data_files`.
        name: which configuration of the dataset.
        split: which split; local files without splits are all "train".
        data_files: paths or glob patterns of files; the documents come in their order.
        text_key: the column with the text. A record whose text is None is an empty document.
        streaming: read while training, instead of preparing a copy on disk first. Streams are not shuffled.
        revision: commit or tag of a Hub dataset.
        cache_dir: where `datasets` keeps what it prepares; its own default if None.
        options: further options of the format, such as `sample_by="document"` for "text".

    Returns:
        A `RandomAccessSource`, or a `StreamSource` if streaming.

    Raises:
        DataError: `datasets` is not installed, a file is missing, there is no column `text_key`, or `datasets` cannot
            load what is asked for.
    """
    patterns = [data_files] if isinstance(data_files, str) else data_files
    files = _local_files(path, patterns)
    request = dict(options, name=name, split=split, streaming=streaming, revision=revision)
    dataset = _load(
        str(Path(path).expanduser()) if _is_folder(path) else path,
        # Absolute paths: `datasets` would look for relative ones inside of a folder given as `path`.
        data_files=patterns if files is None or patterns is None else [str(file.absolute()) for file in files],
        cache_dir=None if cache_dir is None else str(cache_dir),
        **request,
    )
    _check_column(dataset, text_key, path)
    fingerprint = _fingerprint(
        path="a folder" if _is_folder(path) else path,
        request={key: repr(value) for key, value in request.items()},
        text_key=text_key,
        files=patterns if files is None else [[file.name, file.stat().st_size] for file in files],
        rows=None if streaming else len(dataset),
    )
    label = ":".join(part for part in (path, name, files[0].name if path in _FILE_FORMATS and files else None) if part)
    dataset = dataset.select_columns([text_key])  # the others need not be decoded
    if streaming:
        return HuggingFaceStream(dataset, text_key, label, fingerprint)
    return HuggingFaceRows(dataset, text_key, label, fingerprint)


class HuggingFaceRows:
    """The rows of a `datasets.Dataset` as a random-access source; made by `load_huggingface`."""

    def __init__(self, dataset: Any, text_key: str, name: str, fingerprint: str) -> None:
        self._dataset = dataset
        self._text_key = text_key
        self.name = name
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> str:
        return _text(self._dataset[index], self._text_key)


class HuggingFaceStream:
    """The records of a `datasets.IterableDataset` as a stream source; made by `load_huggingface`."""

    def __init__(self, dataset: Any, text_key: str, name: str, fingerprint: str) -> None:
        self._dataset = dataset
        self._text_key = text_key
        self.name = name
        self.fingerprint = fingerprint

    def iterate(self, start: int) -> Iterator[str]:
        """Read the texts from number `start` to the end of the epoch."""
        for record in self._dataset.skip(start):
            yield _text(record, self._text_key)


def _load(path: str, **request: Any) -> Any:
    """Call `datasets.load_dataset`; what it raises becomes a DataError."""
    try:
        import datasets  # late: an optional extra, and slow to import
    except ImportError:
        raise DataError("Hugging Face datasets need an extra: pip install 'titan-data[huggingface]'") from None
    try:
        # trust_remote_code is said aloud, as `datasets` 3 would otherwise ask for leave on the terminal.
        return datasets.load_dataset(path, trust_remote_code=False, **request)
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"datasets could not load {path!r}, split {request['split']!r}: {error}") from error


def _fingerprint(**identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_folder(path: str) -> bool:
    """Whether `path` means a folder on this machine, be it there or not."""
    return path not in _FILE_FORMATS and (path.startswith(("/", ".", "~")) or Path(path).is_dir())


def _local_files(path: str, patterns: Sequence[str] | None) -> list[Path] | None:
    """Find the local files that are asked for, in their order; None where they are not on this machine.

    `datasets` reports a missing file many calls deep, and some only after it has tried the Hub; so look here first.
    """
    if path in _FILE_FORMATS:
        folder = Path()
        if not patterns:
            raise DataError(f"format {path!r} needs data_files: the paths of the files to read")
    elif _is_folder(path):
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


def _check_column(dataset: Any, text_key: str, path: str) -> None:
    """Make sure that the records have the text; some streams show their columns only in the first record."""
    columns = dataset.column_names
    if columns is None:
        first: Mapping[str, Any] | None = next(iter(dataset), None)
        if first is None:
            return  # an empty stream: the loader will say so
        columns = list(first)
    if text_key not in columns:
        raise DataError(f"{path!r} has no column {text_key!r}; set text_key to one of: {', '.join(sorted(columns))}")


def _text(record: Mapping[str, Any], text_key: str) -> str:
    value = record[text_key]
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"column {text_key!r} holds {kind}, not text: set text_key to a column of strings")
    return value
