"""Files made of lines, such as JSONL: records read in order, or in any order by an index of where each begins."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.files.compression import CorruptFileError, compression_of, open_bytes
from titan_data.files.line_index import IndexFolder
from titan_data.files.malformed import MalformedRecords
from titan_data.files.retry import Retry
from titan_data.files.storage import DataFile, changed

Offsets = npt.NDArray[np.int64]

_SCAN = 16 << 20  # bytes searched for line ends at a time
_OPEN_FILES = 64
_LINE_FEED, _RETURN = 10, 13


class LineFormat:
    """Records that are lines, or paragraphs (the lines between blank ones), in UTF-8.

    Args:
        kind: name of the format.
        unit: what one record is.
        decode: turns a record, without its line end, into text; a ValueError says that it is malformed.
        malformed: told of malformed records.
        retry: how often to try where the storage fails.
        index_folder: where indices are kept, if anywhere.
    """

    def __init__(
        self,
        kind: str,
        unit: Literal["line", "paragraph"],
        decode: Callable[[str], str],
        malformed: MalformedRecords,
        retry: Retry,
        index_folder: IndexFolder | None,
    ) -> None:
        self.kind = kind
        self._unit = unit
        self._decode = decode
        self._malformed = malformed
        self._retry = retry
        self._index_folder = index_folder
        self._open_files = _OpenFiles()

    def check(self, file: DataFile) -> None:
        """Nothing to look for: any text will do."""

    def records(self, file: DataFile) -> Generator[bytes, None, None]:
        """Read the bytes of the records in order, with what ends them."""
        with open_bytes(file, self._retry) as lines:
            yield from lines if self._unit == "line" else _paragraphs(lines)

    def stream(self, file: DataFile, start: int) -> Generator[str, None, int]:
        """Read the records from number `start` on, passing over those before without decoding them."""
        known = None if self._index_folder is None else self._index_folder.load_count(file, self._unit)
        if known is not None and known <= start:
            return known
        number = 0
        records = self.records(file)
        try:
            number = sum(1 for _ in islice(records, start))
            while (record := next(records, None)) is not None:
                yield self.text(file, number, record)
                number += 1
        except CorruptFileError as error:
            self._malformed.report(f"{file.label}, after {self._unit} {number}", str(error))
        finally:
            records.close()
        if self._index_folder is not None and known is None:
            self._index_folder.save_count(file, self._unit, number)
        return number

    def index(self, file: DataFile) -> "LineRows":
        """Find where each record begins, by reading the file once (or the index of it that was kept)."""
        if not file.local or compression_of(file.path):
            what = "compressed" if file.local else "remote"
            raise DataError(
                f"{file.label} is {what}, so its records cannot be read in any order: read it as it comes with "
                "streaming=True, or prepare token shards from it"
            )
        begins = None if self._index_folder is None else self._index_folder.load_offsets(file, self._unit)
        if begins is None:
            begins = self._scan(file)
            if self._index_folder is not None:
                begins = self._index_folder.save_offsets(file, self._unit, begins)
        return LineRows(self, file, begins, self._open_files)

    def text(self, file: DataFile, number: int, record: bytes) -> str:
        """Decode a record; what is malformed is reported and empty."""
        if number == 0:
            record = record.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors put it
        try:
            return self._decode(str(record.rstrip(b"\r\n"), "utf-8"))
        except UnicodeDecodeError as error:
            self._malformed.report(self._where(file, number), f"invalid UTF-8: {error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            self._malformed.report(self._where(file, number), str(error))
        return ""

    def _where(self, file: DataFile, number: int) -> str:
        return f"{file.label}, {self._unit} {number + 1}"

    def _scan(self, file: DataFile) -> Offsets:
        """Return int64 `[N + 1]`: where each record begins, and the end of the last."""
        ends = [np.zeros(1, dtype=np.int64)]  # of lines; the first line begins where a line before it would end
        after_return = [np.zeros(1, dtype=np.bool_)]
        position, last = 0, 0
        with open_bytes(file, self._retry) as data:
            while piece := data.read(_SCAN):
                values = np.frombuffer(piece, dtype=np.uint8)
                found = np.flatnonzero(values == _LINE_FEED)
                ends.append(found + (position + 1))
                if self._unit == "paragraph":
                    before = values[found - 1]
                    if found.size and found[0] == 0:
                        before[0] = last
                    after_return.append(before == _RETURN)
                position, last = position + len(piece), piece[-1]
        edges = np.concatenate(ends)
        ended = bool(edges[-1] == position)  # the last line has its line end
        if not ended:
            edges = np.append(edges, position)
        if self._unit == "line":
            return edges
        lengths = np.diff(edges)
        returns = np.concatenate(after_return)[1:]
        if not ended:
            lengths[-1] += 2  # what is not ended is not blank
            returns = np.append(returns, False)
        text = ~((lengths == 1) | ((lengths == 2) & returns))
        text[1:] &= ~text[:-1]  # numpy reads all of the right side first
        return np.append(edges[:-1][text], position)


class LineRows:
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
    """Keeps the files open that were read last; a file that was changed since it was found is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __reduce__(self) -> Any:
        return type(self), ()  # neither files nor locks can be sent to another process

    def read(self, file: DataFile, begin: int, end: int) -> bytes:
        try:
            with self._lock:
                handle = self._handle(file)
                status = os.fstat(handle.fileno())
                handle.seek(begin)
                data = handle.read(end - begin)
        except FileNotFoundError:
            raise DataError(f"{file.label} has disappeared: put it back, and resume") from None
        except OSError as error:
            raise DataError(f"{file.label} could not be read at byte {begin}: {error}") from error
        if len(data) < end - begin or (status.st_size, str(status.st_mtime)) != (file.size, file.version):
            raise DataError(changed(file))
        return data

    def _handle(self, file: DataFile) -> IO[bytes]:
        if (handle := self._open.get(file.path)) is None:
            handle = open(file.path, "rb")  # noqa: SIM115  # closed when another takes its place
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
