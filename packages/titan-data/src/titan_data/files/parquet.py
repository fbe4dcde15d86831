"""Parquet files: texts are one column, read by row group.

`Parquet` is the format, `IndexedParquet` the rows of one file in any order. "Row" is Parquet's word for a record.
"""

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from titan_data.errors import DataError
from titan_data.files.compression import CorruptFileError, WrongSchemaError, compression_of
from titan_data.files.counts import RecordCount
from titan_data.files.malformed import Findings
from titan_data.files.options import StorageOptions
from titan_data.files.storage import DataFile, StorageReader

_BATCH = 256  # rows decoded at a time in a stream


class Parquet:
    """Parquet files of any codec. Null texts are empty documents.

    Args:
        text_key: Name of the text column, or a path into a column of structs, joined by dots.
        findings: Collects malformed rows and unreadable row groups and files.
        storage: How storage is read. At least one decoded row group is kept, whatever `cache_bytes` is.

    Raises:
        DataError: If pyarrow is not installed.
    """

    kind = "parquet"

    def __init__(self, text_key: str, findings: Findings, storage: StorageOptions) -> None:
        _import_pyarrow()
        self._text_key = text_key
        self._findings = findings
        self._retry = storage.retry
        self._cache = _Cache(storage.cache_bytes)

    def check(self, file: DataFile, head: bytes) -> None:
        """Check that the file has the text column."""
        if compression_of(file.suffixes):
            raise DataError(f"{file.label}: Parquet is compressed inside, so decompress the file before reading it")
        with self._open(file) as parquet:
            self._check_column(parquet)

    def stream(self, file: DataFile, start: int) -> Generator[str, None, RecordCount]:
        """Read the rows from number `start` on; earlier row groups are not read."""
        number = 0
        with ExitStack() as stack:
            if (parquet := self._enter(stack, file)) is None:
                return RecordCount(0, exact=file.size == 0)
            for group, size in enumerate(_group_sizes(parquet)):
                if number + size > start:
                    chunks = self._chunks(parquet, file, group, number)
                    yield from self._texts(file, chunks, number, size, max(start - number, 0))
                number += size
        return RecordCount(number)

    def index(self, file: DataFile) -> "IndexedParquet":
        """Find the row groups; no texts are read yet."""
        with ExitStack() as stack:
            parquet = self._enter(stack, file)
            return IndexedParquet(self, file, [] if parquet is None else _group_sizes(parquet))

    def text(self, file: DataFile, group: int, first: int, index: int) -> str:
        """Read one row, from its decoded row group.

        Args:
            file: The file.
            group: Number of the row group in the file.
            first: Number of the group's first row.
            index: Number of the row in the group.
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
        return ""  # in the unreadable rest of a corrupt row group

    def _texts(self, file: DataFile, chunks: Iterator[Any], first: int, size: int, start: int) -> Iterator[str]:
        number = 0
        for chunk in chunks:
            for i in range(max(start - number, 0), len(chunk)):
                yield self._decode(file, first + number + i, chunk[i])
            number += len(chunk)
        yield from [""] * (size - max(number, start))  # the unreadable rest of a corrupt row group

    def _chunks(self, parquet: Any, file: DataFile, group: int, first: int) -> Iterator[Any]:
        """Read a row group's texts in chunks, up to where it is corrupt."""
        number = first
        try:
            # Without threads: requests stay in order, and the cores are left to training.
            batches = parquet.iter_batches(_BATCH, row_groups=[group], columns=[self._text_key], use_threads=False)
            for batch in _readable(batches):
                yield _inner_column(batch.column(0), batch.schema.names[0], self._text_key)
                number += len(batch)
        except CorruptFileError as error:
            lost = first + _group_sizes(parquet)[group] - number
            where = f"{file.label}, row group {group} from row {number} on"
            self._findings.report_file(where, str(error), f"{lost:,} rows")

    def _decode(self, file: DataFile, row: int, value: Any) -> str:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            self._findings.report(f"{file.label}, row {row}", f"invalid UTF-8: {error.reason} at byte {error.start}")
            return ""
        return "" if text is None else str(text)

    def _enter(self, stack: ExitStack, file: DataFile) -> Any:
        """Open a file; None if it is empty or unreadable (which is reported)."""
        if file.size == 0:
            return None
        try:
            parquet = stack.enter_context(self._open(file))
            self._check_column(parquet)
        except CorruptFileError as error:
            self._findings.report_file(file.label, str(error), error.lost)
        else:
            return parquet
        return None

    @contextmanager
    def _open(self, file: DataFile) -> Iterator[Any]:
        parquet_module = _import_pyarrow()
        with StorageReader(file, self._retry) as reader:
            with _corrupt_file_errors(f"{file.size:,} bytes" if file.size else "all of it"):
                parquet = parquet_module.ParquetFile(reader, pre_buffer=False)
            yield parquet

    def _check_column(self, parquet: Any) -> None:
        """Check that the text column exists and contains text."""
        schema = parquet.schema_arrow
        rows = f"{parquet.metadata.num_rows:,} rows"
        if (kind := _column_type(schema, self._text_key)) is None:
            names = ", ".join(_paths(schema))
            raise WrongSchemaError(f"has no column {self._text_key!r}; set text_key to one of: {names}", rows)
        texts = kind.value_type if str(kind).startswith("dictionary") else kind
        if str(texts) not in ("string", "large_string", "string_view", "null"):
            raise WrongSchemaError(
                f"has no text in column {self._text_key!r}, but {kind}: set text_key to a column of strings", rows
            )


class IndexedParquet:
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


def _column_type(schema: Any, key: str) -> Any:
    """Return the type of a column, or of a field in a column of structs; None if there is none."""
    names = [field.name for field in schema]
    if key in names:
        return schema[names.index(key)].type
    for field in schema:
        if key.startswith(f"{field.name}.") and str(field.type).startswith("struct"):
            return _column_type(list(field.type), key[len(field.name) + 1 :])
    return None


def _inner_column(column: Any, name: str, key: str) -> Any:
    """Return the field of a column of structs that a key names; the column itself if that is its name."""
    if key == name:
        return column
    import pyarrow.compute  # here: an optional extra

    key = key[len(name) + 1 :]
    field = next(field for field in column.type if key == field.name or key.startswith(f"{field.name}."))
    return _inner_column(pyarrow.compute.struct_field(column, field.name), field.name, key)


def _paths(schema: Any) -> list[str]:
    """List the columns, those in columns of structs as paths."""
    paths: list[str] = []
    for field in schema:
        inner = _paths(field.type) if str(field.type).startswith("struct") else []
        paths += [f"{field.name}.{path}" for path in inner] or [field.name]
    return paths


class _Cache:
    """The row groups that were read last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], list[Any]] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> Any:
        return type(self), (self._limit,)  # locks cannot be pickled

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


def _readable(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with _corrupt_file_errors("the rest of the row group"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _corrupt_file_errors(lost: str) -> Iterator[None]:
    """Turn pyarrow's errors into CorruptFileError; errors of storage are DataErrors and pass through."""
    import pyarrow  # here: an optional extra

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else repr(error)
        raise CorruptFileError(f"corrupt Parquet: {why}", lost) from error


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet  # here: an optional extra
    except ImportError:
        raise DataError("Parquet files need an extra: pip install 'titan-data[parquet]'") from None
    return pyarrow.parquet
