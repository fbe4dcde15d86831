"""`load_huggingface_dataset`: datasets of the Hugging Face Hub or of local files, memory-mapped or as a stream.

Needs the extra `titan-data[huggingface]`. Code that comes with a dataset is never run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_data.errors import DataError
from titan_data.files.glob import find_files
from titan_data.files.inputs import InputFiles
from titan_data.files.retry import Retry, describe_error, may_pass
from titan_data.files.storage import DataFile, digest_sample
from titan_data.fingerprint import Fingerprint
from titan_data.sources._huggingface_columns import check_column, text_of, top_column
from titan_data.sources._huggingface_files import FILE_FORMATS, is_folder, local_files
from titan_data.sources.base import RandomAccessSource, StreamSource

# Short names for Hub datasets: (name, configuration). They are too large to be prepared on disk, so they stream.
_KNOWN = {"c4": ("allenai/c4", "en")}


@dataclass(frozen=True)
class HubOptions:
    """How `load_huggingface_dataset` gets a dataset from the Hugging Face Hub.

    Attributes:
        revision: Commit or tag of the dataset; None for the newest.
        cache_directory: Where `datasets` keeps what it prepares; None for its default.
        retry: With streaming, how often to retry when the network fails (`datasets` itself retries, too).
    """

    revision: str | None = None
    cache_directory: str | Path | None = None
    retry: Retry = field(default_factory=Retry)


def load_huggingface_dataset(
    path: str,
    name: str | None = None,
    *,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    text_key: str = "text",
    streaming: bool | None = None,
    shards: int = 32,
    source_name: str | None = None,
    hub: HubOptions | None = None,
    **options: Any,
) -> RandomAccessSource | StreamSource:
    """Open a Hugging Face dataset as a source.

    The fingerprint consists of the arguments, of the names, sizes and samples of local files (not of their folder: they
    may be moved), of a Hub dataset's commit, and, unless streaming, of the number of records. A Hub dataset may change
    under its name: a resume then fails, with the commit to pass as `revision`.

    A stream resumes by reading each shard again up to its cursor. If that takes too long, read the dataset's files
    with `load_files("hf://datasets/…", streaming=True, storage=StorageOptions(index_directory=…))`, or prepare token
    shards.

    Args:
        path: Name of a Hub dataset, a local folder, or the format ("json", "parquet", "text", "csv", "arrow") of
            `data_files`. "c4" is allenai/c4, configuration en, as a stream (unless there is a folder of that name).
        name: Configuration of the dataset.
        split: Split of the dataset; local files without splits are all "train".
        data_files: Paths or glob patterns of files; documents come in their order.
        text_key: Column of the text; a path for nested ones ("meta.text"). A record whose text is None is an empty
            document.
        streaming: Read during training, instead of preparing a copy on disk first. Streams are not shuffled. None:
            only for "c4".
        shards: With streaming, number of logical shards that the dataset's files are distributed over; at most one per
            file. A stream's order depends on it.
        source_name: The source's name; by default made of `path`, `name` and the first file.
        hub: Options for the Hub; `HubOptions()` if None.
        options: Further options of the format, such as `sample_by="document"` for "text".

    Returns:
        A random-access source, or a stream if streaming.

    Raises:
        DataError: If `datasets` is not installed, a file does not exist, the Hub cannot be reached, there is no column
            `text_key`, or `datasets` cannot load the dataset.
    """
    hub = hub or HubOptions()
    label = path
    if path in _KNOWN and not is_folder(path):
        path, known_name = _KNOWN[path]
        name = name or known_name
        streaming = True if streaming is None else streaming
    patterns = [data_files] if isinstance(data_files, str) else data_files
    files = local_files(path, patterns)
    request = dict(options, name=name, split=split, streaming=bool(streaming), revision=hub.revision)
    dataset, commit = _open(path, patterns, files, hub.cache_directory, request)
    check_column(dataset, text_key, path)
    # The others need not be decoded.
    dataset = dataset.select_columns([top_column(dataset, text_key)])
    settings = {key: repr(value) for key, value in request.items() if value is not None}
    settings |= {"path": "a folder" if is_folder(path) else path, "text_key": text_key}
    if commit is not None:
        settings["revision"] = commit
    named = source_name is not None or not is_folder(path)
    source_name = source_name or _source_name(path, label, name, files)
    found = None if files is None else find_files([*files]) if files else []
    inputs = None if found is None else InputFiles(found, hub.retry)
    if not streaming:
        fingerprint = _fingerprint(found, patterns, {**settings, "rows": len(dataset)})
        return HuggingFaceRecords(dataset, text_key, source_name, fingerprint, inputs, named=named)
    if shards < 1:
        raise DataError(f"a stream needs at least 1 shard, not {shards}")
    shards = min(shards, dataset.num_shards)
    fingerprint = _fingerprint(found, patterns, {**settings, "shards": shards})
    return HuggingFaceStream(
        dataset, text_key, fingerprint, name=source_name, shards=shards, retry=hub.retry, inputs=inputs, named=named
    )


class HuggingFaceRecords:
    """The records of a `datasets.Dataset` as a random-access source; made by `load_huggingface_dataset`."""

    def __init__(
        self,
        dataset: Any,
        text_key: str,
        name: str,
        fingerprint: Fingerprint,
        inputs: InputFiles | None = None,
        *,
        named: bool = True,
    ) -> None:
        self._dataset = dataset
        self._text_key = text_key
        self._fingerprint = fingerprint
        self.inputs = inputs
        self.named = named  # see `identity_of`
        self.name = name

    def fingerprint(self) -> Fingerprint:
        """Return the names and digests of the files, and the arguments."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> str:
        return text_of(self._dataset[index], self._text_key)


class HuggingFaceStream:
    """The records of a `datasets.IterableDataset` as a stream source; made by `load_huggingface_dataset`."""

    def __init__(
        self,
        dataset: Any,
        text_key: str,
        fingerprint: Fingerprint,
        *,
        name: str,
        shards: int,
        retry: Retry,
        inputs: InputFiles | None = None,
        named: bool = True,
    ) -> None:
        self._dataset = dataset
        self._text_key = text_key
        self._fingerprint = fingerprint
        self.inputs = inputs
        self.named = named  # see `identity_of`
        self._retry = retry
        self.name = name
        self.shards = shards

    def fingerprint(self) -> Fingerprint:
        """Return the names and digests of the files, and the arguments."""
        return self._fingerprint

    def iterate(self, shard: int, start: int, /) -> Iterator[str]:
        """Read a shard's texts from number `start` to the end; continue after temporary errors."""
        # Not contiguous: files added at the end leave the order of the others unchanged.
        dataset = self._dataset.shard(num_shards=self.shards, index=shard, contiguous=False)
        failures, number = 0, start
        while True:
            try:
                for record in dataset.skip(number):
                    text = text_of(record, self._text_key)
                    failures = 0
                    number += 1
                    yield text
                return
            except DataError:
                raise
            except Exception as error:
                failures += 1
                if not _is_of_network(error) or failures >= self._retry.attempts:
                    times = f" after {failures} attempts" if failures > 1 else ""
                    raise DataError(
                        f"source {self.name!r}, shard {shard} of {self.shards}: record {number} could not be read"
                        f"{times}: {describe_error(error)}"
                    ) from error
            self._retry.wait(failures)


def _is_of_network(error: Exception) -> bool:
    """Whether a retry may help; it does not if the data are corrupt."""
    # Parse errors are ValueErrors, or have one as their cause; truncated files are EOFErrors.
    chain = (error, error.__cause__)
    return may_pass(error) and not any(isinstance(e, ValueError | TypeError | KeyError | EOFError) for e in chain)


def _open(
    path: str,
    patterns: Sequence[str] | None,
    files: Sequence[Path] | None,
    cache_directory: str | Path | None,
    request: Mapping[str, Any],
) -> tuple[Any, str | None]:
    """Open a dataset; return it, and a Hub dataset's commit if that is known."""
    if path in FILE_FORMATS or is_folder(path):
        # Absolute paths: `datasets` would look for relative ones inside of a folder given as `path`.
        named = patterns if files is None or patterns is None else [str(file.absolute()) for file in files]
        path = str(Path(path).expanduser()) if is_folder(path) else path
        return _load(path, cache_directory, data_files=named, **request), None
    commit = _ask_hub(path, request["revision"], cache_directory, streaming=request["streaming"])
    dataset = _load(
        path, cache_directory, **{"data_files": patterns, **request, "revision": commit or request["revision"]}
    )
    if commit is None and not request["streaming"]:
        commit = _cached_commit(dataset)
    return dataset, commit


def _ask_hub(path: str, revision: str | None, cache_directory: str | Path | None, *, streaming: bool) -> str | None:
    """Ask the Hub for the commit of a revision; None if it has no answer.

    One request: `datasets` itself would take half a minute to report that there is no network.

    Raises:
        DataError: If the Hub cannot be reached, and the dataset is not in the cache.
    """
    datasets = _import_datasets()
    import huggingface_hub  # here: comes with `datasets`, an optional extra

    try:
        info = huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=10)
    except (huggingface_hub.errors.HfHubHTTPError, ValueError):
        return None  # an error of the Hub, or an invalid name: `datasets` reports it better
    except Exception as error:
        cache = Path(cache_directory or datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")
        if streaming or not cache.is_dir():
            raise DataError(
                f"the Hugging Face Hub cannot be reached for dataset {path!r} ({describe_error(error)}): connect to "
                "the network, or read local files instead, such as a download of the dataset"
            ) from error
        return None
    return info.sha


def _cached_commit(dataset: Any) -> str | None:
    """Return the commit of a prepared dataset, which `datasets` makes part of its cache path."""
    folders = [Path(file["filename"]).parent.name for file in dataset.cache_files]
    return next((folder for folder in folders if re.fullmatch("[0-9a-f]{40}", folder)), None)


def _load(path: str, cache_directory: str | Path | None, **request: Any) -> Any:
    """Call `datasets.load_dataset`; its errors become DataErrors."""
    datasets = _import_datasets()
    try:
        # Explicit trust_remote_code: `datasets` 3 would otherwise ask for permission on the terminal.
        cache = None if cache_directory is None else str(cache_directory)
        return datasets.load_dataset(path, trust_remote_code=False, cache_dir=cache, **request)
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"datasets could not load {path!r}, split {request['split']!r}: {error}") from error


def _import_datasets() -> Any:
    try:
        import datasets  # here: an optional extra, and slow to import
    except ImportError:
        raise DataError("Hugging Face datasets need an extra: pip install 'titan-data[huggingface]'") from None
    return datasets


def _fingerprint(
    files: Sequence[DataFile] | None, patterns: Sequence[str] | None, settings: Mapping[str, str | int]
) -> Fingerprint:
    if files is None:
        items = [(pattern, "") for pattern in patterns or ()]
    else:
        items = [(file.name, digest_sample(file, Retry())[0]) for file in files]
    return Fingerprint.of("huggingface", items, settings)


def _source_name(path: str, label: str, name: str | None, files: Sequence[Path] | None) -> str:
    first_file = files[0].name if path in FILE_FORMATS and files else None
    label = Path(path).expanduser().absolute().name if is_folder(path) else label
    return ":".join(part for part in (label, name, first_file) if part)
