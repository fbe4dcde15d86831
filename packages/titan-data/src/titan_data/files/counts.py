"""How many records files have: the one place where a stream learns, keeps and asks that.

A format says when it has come to the end of a file (`RecordCount`); `RecordCounts` keeps it, so that a file before the
point of a resume need not be read again. Called by `FileStream`.
"""

from dataclasses import dataclass

from titan_data.files.line_index import IndexDirectory
from titan_data.files.storage import DataFile


@dataclass(frozen=True)
class RecordCount:
    """The number of records that reading a file to its end gives.

    Attributes:
        records: Their number, those that were skipped included.
        exact: Whether the file ends there. False if it cannot be read further: it has at least these, and every reading
            of the same file gives these.
    """

    records: int
    exact: bool = True


class RecordCounts:
    """The counts of the files of one stream that were read to their ends.

    Counts of complete files are also kept in the index directory. That of a corrupt file is not: each run has to report
    the file.

    Args:
        unit: What a record is, such as "jsonl" or "text/line".
        index: Where counts are kept from one run to the next, or None.
    """

    def __init__(self, unit: str, index: IndexDirectory | None) -> None:
        self._unit = unit
        self._index = index
        self._known: dict[tuple[str, str], int] = {}

    def get(self, file: DataFile) -> int | None:
        """Return the number of a file's records; None if the file has to be read to know it."""
        if (key := (file.label, file.path)) not in self._known and self._index is not None:
            count = self._index.load_count(file, self._unit)
            if count is not None:
                self._known[key] = count
        return self._known.get(key)

    def put(self, file: DataFile, count: RecordCount) -> None:
        """Keep what reading a file to its end has given."""
        known = self.get(file)
        self._known[file.label, file.path] = count.records
        if self._index is not None and count.exact and known != count.records:
            self._index.save_count(file, self._unit, count.records)
