"""What a file format has to offer to be read as a stream and, where it can, in any order."""

from collections.abc import Generator
from typing import Protocol

from titan_data.files.storage import DataFile


class Rows(Protocol):
    """The records of one file, in any order."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int, /) -> str:
        """The text of record `index`; empty if the record is malformed."""
        ...


class FileFormat(Protocol):
    """Reads the files of one format. A record that is malformed is reported, and is then an empty text."""

    @property
    def kind(self) -> str:
        """Name of the format, for fingerprints."""
        ...

    def check(self, file: DataFile) -> None:
        """Look at a file before anything else is read.

        Raises:
            DataError: it can hold no texts, such as where the text's column is missing.
        """
        ...

    def stream(self, file: DataFile, start: int) -> Generator[str, None, int]:
        """Read the records from number `start` on.

        Returns:
            Number of records in the file, those before `start` included.
        """
        ...

    def index(self, file: DataFile) -> Rows:
        """Make the records readable in any order.

        Raises:
            DataError: those of this file cannot be.
        """
        ...
