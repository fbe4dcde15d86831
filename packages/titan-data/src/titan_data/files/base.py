"""The protocols of file formats: records read in order, or indexed for any order."""

from collections.abc import Generator
from typing import Protocol

from titan_data.files.counts import RecordCount
from titan_data.files.storage import DataFile


class IndexedFile(Protocol):
    """The records of one file, in any order."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int, /) -> str:
        """The text of record `index`; empty if the record is malformed."""
        ...


class FileFormat(Protocol):
    """Reads the files of one format. A malformed record is reported and becomes an empty text."""

    @property
    def kind(self) -> str:
        """Name of the format, for fingerprints."""
        ...

    def check(self, file: DataFile, head: bytes) -> None:
        """Check the beginning or footer of a file before anything else is read.

        Args:
            file: The file.
            head: Its first bytes, so that it need not be opened for them.

        Raises:
            WrongSchemaError: If the file has no texts where they are looked for.
            CorruptFileError: If it is already seen to be corrupt.
            DataError: If files like this cannot be read at all.
        """
        ...

    def stream(self, file: DataFile, start: int) -> Generator[str, None, RecordCount]:
        """Read the records from number `start` on.

        Returns:
            The number of records in the file, including those before `start`: the same whatever `start` is.
        """
        ...

    def index(self, file: DataFile) -> IndexedFile:
        """Make the records readable in any order.

        Raises:
            DataError: If this is not possible for the file.
        """
        ...
