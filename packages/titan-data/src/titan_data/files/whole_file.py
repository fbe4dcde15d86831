"""Plain text with one document per file. Files of lines or paragraphs are read by `lines`."""

from collections.abc import Generator

from titan_data.files.compression import CorruptFileError, open_bytes
from titan_data.files.counts import RecordCount
from titan_data.files.malformed import Findings
from titan_data.files.retry import Retry
from titan_data.files.storage import DataFile


class WholeFiles:
    """Text files that are one document each, compressed or not.

    Args:
        findings: Collects malformed and unreadable files.
        retry: How reads are retried.
    """

    kind = "text"

    def __init__(self, findings: Findings, retry: Retry) -> None:
        self._findings = findings
        self._retry = retry

    def check(self, file: DataFile, head: bytes) -> None:
        """Do nothing: any text is valid."""

    def stream(self, file: DataFile, start: int) -> Generator[str, None, RecordCount]:
        """Read the document, unless `start` is after it."""
        if start == 0:
            yield self.text(file)
        return RecordCount(1)

    def index(self, file: DataFile) -> "IndexedWholeFile":
        """Make the document readable; nothing is read yet."""
        return IndexedWholeFile(self, file)

    def text(self, file: DataFile) -> str:
        """Read a file; a malformed one is reported and empty."""
        try:
            with open_bytes(file, self._retry) as data:
                return str(data.read().removeprefix(b"\xef\xbb\xbf"), "utf-8")
        except CorruptFileError as error:
            self._findings.report_file(file.label, str(error), error.lost)
        except UnicodeDecodeError as error:
            self._findings.report(file.label, f"invalid UTF-8: {error.reason} at byte {error.start}")
        return ""


class IndexedWholeFile:
    """The one document of a file."""

    def __init__(self, whole_files: WholeFiles, file: DataFile) -> None:
        self._whole_files = whole_files
        self._file = file

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int, /) -> str:
        return self._whole_files.text(self._file)
