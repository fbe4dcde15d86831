"""Files of lines, such as JSONL: records read in order, or in any order with an index of where each begins.

`LineFormat` is the format, `IndexedLines` the records of one file in any order.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.files.compression import CorruptFileError, compression_of, open_bytes
from titan_data.files.counts import RecordCount
from titan_data.files.line_index import IndexDirectory
from titan_data.files.malformed import Findings
from titan_data.files.options import StorageOptions
from titan_data.files.reading import reading
from titan_data.files.storage import DataFile, changed

Offsets = npt.NDArray[np.int64]

_SCAN = 16 << 20  # bytes searched for line ends at a time
_OPEN_FILES = 64
_LINE_FEED, _RETURN = 10, 13


class LineFormat:
    """Records that are lines, or paragraphs (the lines between blank ones), in UTF-8.

    Args:
        kind: Name of the format.
        unit: What one record is.
        decode: Turns a record, without its line end, into text; raises ValueError if it is malformed.
        findings: Collects malformed records and unreadable files.
        storage: How storage is read, and where indices are kept.
    """

    def __init__(
        self,
        kind: str,
        unit: Literal["line", "paragraph"],
        decode: Callable[[str], str],
        findings: Findings,
        storage: StorageOptions,
    ) -> None:
        self.kind = kind
        self._unit = unit
        self._decode = decode
        self._findings = findings
        self._retry = storage.retry
        directory = storage.index_directory
        self._index_directory = None if directory is None else IndexDirectory(directory)
        self._open_files = _OpenFiles()

    def check(self, file: DataFile, head: bytes) -> None:
        """Do nothing: any text is valid."""

    def records(self, file: DataFile) -> Generator[bytes, None, None]:
        """Read the bytes of the records in order, line ends included."""
        with open_bytes(file, self._retry) as lines:
            yield from lines if self._unit == "line" else _paragraphs(lines)

    def stream(self, file: DataFile, start: int) -> Generator[str, None, RecordCount]:
        """Read the records from number `start` on; earlier ones are skipped without decoding."""
        number = 0
        records = self.records(file)
        try:
            for record in records:
                if number >= start:
                    yield self.text(file, number, record)
                number += 1
        except CorruptFileError as error:
            self._findings.report_file(f"{file.label}, after {self._unit} {number}", str(error), error.lost)
            return RecordCount(number, exact=False)
        finally:
            records.close()
        return RecordCount(number)

    def index(self, file: DataFile) -> "IndexedLines":
        """Find where each record begins, by reading the file once or from a saved index."""
        if not file.local or compression_of(file.suffixes):
            what = "compressed" if file.local else "remote"
            raise DataError(
                f"{file.label} is {what}, so its records cannot be read in any order: read them in order with "
                "streaming=True, or prepare token shards"
            )
        begins = None if self._index_directory is None else self._index_directory.load_offsets(file, self._unit)
        if begins is None:
            begins = self._scan(file)
            if self._index_directory is not None:
                begins = self._index_directory.save_offsets(file, self._unit, begins)
        return IndexedLines(self, file, begins, self._open_files)

    def text(self, file: DataFile, number: int, record: bytes) -> str:
        """Decode a record; a malformed one is reported and empty."""
        if number == 0:
            record = record.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors write it
        try:
            return self._decode(str(record.rstrip(b"\r\n"), "utf-8"))
        except UnicodeDecodeError as error:
            self._findings.report(self._where(file, number), f"invalid UTF-8: {error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            self._findings.report(self._where(file, number), str(error))
        return ""

    def _where(self, file: DataFile, number: int) -> str:
        return f"{file.label}, {self._unit} {number + 1}"

    def _scan(self, file: DataFile) -> Offsets:
        """Find where records begin, in one pass over the file.

        A paragraph begins at a line that is not blank after one that is, so for each line it is noted whether a
        carriage return comes before its line feed: a blank line has one byte, or two with a carriage return.

        Returns:
            int64 `[N + 1]`, where each record begins, and the end of the last.
        """
        ends = [np.zeros(1, dtype=np.int64)]  # of lines; the first line begins where a line before it would end
        after_return = [np.zeros(1, dtype=np.bool_)]
        position, last = 0, 0
        with open_bytes(file, self._retry) as data:
            while chunk := data.read(_SCAN):
                values = np.frombuffer(chunk, dtype=np.uint8)
                found = np.flatnonzero(values == _LINE_FEED)
                ends.append(found + (position + 1))
                if self._unit == "paragraph":
                    before = values[found - 1]
                    if found.size and found[0] == 0:
                        before[0] = last
                    after_return.append(before == _RETURN)
                position, last = position + len(chunk), chunk[-1]
        edges = np.concatenate(ends)
        ended = bool(edges[-1] == position)  # the last line has its line end
        if not ended:
            edges = np.append(edges, position)
        if self._unit == "line":
            return edges
        lengths = np.diff(edges)
        returns = np.concatenate(after_return)[1:]
        if not ended:
            lengths[-1] += 2  # a last line without a line end is not blank
            returns = np.append(returns, False)
        text = ~((lengths == 1) | ((lengths == 2) & returns))
        text[1:] &= ~text[:-1]  # numpy evaluates the right side first
        return np.append(edges[:-1][text], position)


class IndexedLines:
    """The records of one uncompressed local file, in any order."""

    def __init__(self, line_format: LineFormat, file: DataFile, begins: Offsets, open_files: "_OpenFiles") -> None:
        self._format = line_format
        self._file = file
        self._begins = begins
        self._open_files = open_files

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int, /) -> str:
        begin, end = int(self._begins[index]), int(self._begins[index + 1])
        return self._format.text(self._file, index, self._open_files.read(self._file, begin, end))


class _OpenFiles:
    """Keeps the files open that were read last; raises if a file has changed since it was found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __reduce__(self) -> Any:
        return type(self), ()  # open files and locks cannot be pickled

    def read(self, file: DataFile, begin: int, end: int) -> bytes:
        try:
            with self._lock, reading(file.label):
                handle = self._handle(file)
                status = os.fstat(handle.fileno())
                handle.seek(begin)
                data = handle.read(end - begin)
        except FileNotFoundError:
            raise DataError(f"{file.label} has disappeared: restore it, and resume") from None
        except OSError as error:
            raise DataError(f"{file.label} could not be read at byte {begin}: {error}") from error
        if len(data) < end - begin or (status.st_size, str(status.st_mtime)) != (file.size, file.version):
            raise DataError(changed(file))
        return data

    def _handle(self, file: DataFile) -> IO[bytes]:
        if (handle := self._open.get(file.path)) is None:
            handle = open(file.path, "rb")  # noqa: SIM115  # closed when another file replaces it
            self._open[file.path] = handle
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(file.path)
        return handle


def _paragraphs(lines: Iterator[bytes]) -> Iterator[bytes]:
    paragraph: list[bytes] = []
    for line in lines:
        if line not in (b"\n", b"\r\n"):
            paragraph.append(line)
        elif paragraph:
            yield b"".join(paragraph)
            paragraph = []
    if paragraph:
        yield b"".join(paragraph)
