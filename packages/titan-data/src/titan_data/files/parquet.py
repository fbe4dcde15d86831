"""Parquet: texts are one column; row groups are what can be read by themselves."""

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from titan_data.errors import DataError
from titan_data.files.compression import CorruptFileError, compression_of
from titan_data.files.malformed import MalformedRecords
from titan_data.files.retry import Retry
from titan_data.files.storage import DataFile, StorageReader

_BATCH = 256  # rows decoded at a time in a stream


class Parquet:
    """Parquet files of any codec. A text that is null is an empty document.

    Args:
        text_key: name of the text's column.
        malformed: told of malformed rows, row groups and files.
        retry: how often to try where the storage fails.
        cache_bytes: how much decoded text of row groups is kept for reading in any order; the last one read always is.

    Raises:
        DataError: pyarrow is not installed.
    """

    kind = "parquet"

    def __init__(self, text_key: str, malformed: MalformedRecords, retry: Retry, cache_bytes: int) -> None:
        _import_pyarrow()
        self._text_key = text_key
        self._malformed = malformed
        self._retry = retry
        self._cache = _Cache(cache_bytes)

    def check(self, file: DataFile) -> None:
        """Make sure that the file has the text's column."""
        if compression_of(file.name):
            raise DataError(f"{file.label}: Parquet is compressed inside, so decompress the file before reading it")
        try:
            with self._open(file) as parquet:
                self._column(parquet)
        except CorruptFileError:
            pass  # reported when it is read
        except _ColumnError as error:
            raise DataError(f"{file.label} has {error}") from None

    def stream(self, file: DataFile, start: int) -> Generator[str, None, int]:
        """Read the rows from number `start` on; row groups that lie before are not read."""
        number = 0
        with ExitStack() as stack:
            if (parquet := self._enter(stack, file)) is None:
                return 0
            for group, size in enumerate(_group_sizes(parquet)):
                if number + size > start:
                    chunks = self._chunks(parquet, file, group, number)
                    yield from self._texts(file, chunks, number, size, max(start - number, 0))
                number += size
        return number

    def index(self, file: DataFile) -> "ParquetRows":
        """Find the row groups; nothing else is read yet."""
        with ExitStack() as stack:
            parquet = self._enter(stack, file)
            return ParquetRows(self, file, [] if parquet is None else _group_sizes(parquet))

    def text(self, file: DataFile, group: int, first: int, index: int) -> str:
        """Read one row, by way of its whole row group.

        Args:
            file: which one.
            group: number of the row group in the file.
            first: number of the group's first row.
            index: number of the row in the group.
        """
        chunks = self._cache.get((file.path, group))
        if chunks is None:
            with ExitStack() as stack:
                parquet = self._enter(stack, file)
                chunks = [] if parquet is None else list(self._chunks(parquet, file, group, first))
            self._cache.put((file.path, group), chunks)
        for chunk in chunks:
            if index < len(chunk):
                return self._decode(file, first + index, chunk[index])
            index -= len(chunk)
        return ""  # of the rest of a row group that is damaged

    def _texts(self, file: DataFile, chunks: Iterator[Any], first: int, size: int, start: int) -> Iterator[str]:
        number = 0
        for chunk in chunks:
            for i in range(max(start - number, 0), len(chunk)):
                yield self._decode(file, first + number + i, chunk[i])
            number += len(chunk)
        yield from [""] * (size - max(number, start))  # the rest of a row group that is damaged

    def _chunks(self, parquet: Any, file: DataFile, group: int, first: int) -> Iterator[Any]:
        """Read a row group's texts in pieces, up to where it is damaged."""
        number = first
        try:
            # Without threads: the order of the requests stays, and training has a use for the cores.
            batches = parquet.iter_batches(_BATCH, row_groups=[group], columns=[self._text_key], use_threads=False)
            for batch in _until_damaged(batches):
                yield batch.column(0)
                number += len(batch)
        except CorruptFileError as error:
            self._malformed.report(f"{file.label}, row group {group} from row {number} on", str(error))

    def _decode(self, file: DataFile, row: int, value: Any) -> str:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            self._malformed.report(f"{file.label}, row {row}", f"invalid UTF-8: {error.reason} at byte {error.start}")
            return ""
        return "" if text is None else str(text)

    def _enter(self, stack: ExitStack, file: DataFile) -> Any:
        """Open a file; None if it is empty, or cannot be read and is reported."""
        if file.size == 0:
            return None
        try:
            parquet = stack.enter_context(self._open(file))
            self._column(parquet)
        except CorruptFileError as error:
            self._malformed.report(file.label, str(error))
        except _ColumnError as error:
            self._malformed.report(file.label, f"has {error}")
        else:
            return parquet
        return None

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[Any]:
        parquet_module = _import_pyarrow()
        with StorageReader(file, self._retry) as reader:
            with _damage():
                parquet = parquet_module.ParquetFile(reader, pre_buffer=False)
            yield parquet

    def _column(self, parquet: Any) -> None:
        """Make sure that there is the column, and that it is text."""
        schema = parquet.schema_arrow
        if self._text_key not in schema.names:
            raise _ColumnError(f"no column {self._text_key!r}; set text_key to one of: {', '.join(schema.names)}")
        kind = schema.field(self._text_key).type
        texts = kind.value_type if str(kind).startswith("dictionary") else kind
        if str(texts) not in ("string", "large_string", "string_view", "null"):
            raise _ColumnError(f"no text in column {self._text_key!r}, but {kind}: set text_key to a column of strings")


class ParquetRows:
    """The rows of one file, in any order."""

    def __init__(self, parquet: Parquet, file: DataFile, sizes: list[int]) -> None:
        self._parquet = parquet
        self._file = file
        self._sizes = sizes
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return sum(self._sizes)

    def __getitem__(self, index: int, /) -> str:
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group]) - self._sizes[group]
        return self._parquet.text(self._file, group, first, index - first)


def _group_sizes(parquet: Any) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]


class _ColumnError(Exception):
    """The text's column is missing or holds something else."""


class _Cache:
    """Row groups that were read last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], list[Any]] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> Any:
        return type(self), (self._limit,)  # a lock cannot be sent to another process

    def get(self, key: tuple[str, int]) -> list[Any] | None:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)

    def put(self, key: tuple[str, int], chunks: list[Any]) -> None:
        with self._lock:
            if key in self._groups:
                return
            self._groups[key] = chunks
            self._bytes += _size(chunks)
            while self._bytes > self._limit and len(self._groups) > 1:
                self._bytes -= _size(self._groups.popitem(last=False)[1])


def _size(chunks: list[Any]) -> int:
    return sum(chunk.nbytes for chunk in chunks)


def _until_damaged(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with _damage():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _damage() -> Iterator[None]:
    """Turn what pyarrow raises into a CorruptFileError; what the storage raises is a DataError, and stays one."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CorruptFileError(f"damaged Parquet: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet  # late: an optional extra
    except ImportError:
        raise DataError("Parquet files need an extra: pip install 'titan-data[parquet]'") from None
    return pyarrow.parquet
