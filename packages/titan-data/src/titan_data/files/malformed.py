"""What cannot be read: malformed records and unreadable files, reported by name and counted, or errors.

Called by the formats. A record is one document; a file, or the rest of one, may be any number of them, so the two are
never counted together.
"""

import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

from titan_data.errors import DataError

OnMalformed = Literal["skip", "raise"]
OnUnreadableFile = Literal["skip", "raise"]

_logger = logging.getLogger("titan_data")
_NAMED = 5  # records with a warning each; then a total at 10, 100, 1000, …
_REMEMBERED = 100_000  # records remembered, so that a second epoch does not count them again


class UnreadableFile(NamedTuple):
    """A file that could not be read, or not to its end.

    Attributes:
        where: The file, and where in it reading has ended.
        why: What is wrong with it.
        lost: How much was not read, in rows or bytes.
    """

    where: str
    why: str
    lost: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why} (lost: {self.lost})"


class Findings:
    """Collects what is wrong with the files of one source.

    Args:
        source: The source's name, for the warnings.
        on_malformed: "skip" to warn about malformed records and continue, "raise" to stop.
        on_unreadable_file: "skip" to warn about unreadable files and continue, "raise" to stop.
    """

    def __init__(self, source: str, on_malformed: OnMalformed, on_unreadable_file: OnUnreadableFile) -> None:
        self._source = source
        self._on_malformed = on_malformed
        self._on_unreadable_file = on_unreadable_file
        self._records: set[str] = set()
        self._files: dict[str, UnreadableFile] = {}

    @property
    def malformed(self) -> int:
        """Number of malformed records so far; stops at 100,000."""
        return len(self._records)

    @property
    def unreadable(self) -> tuple[UnreadableFile, ...]:
        """The unreadable files found so far, each once."""
        return tuple(self._files.values())

    @property
    def stops_at_files(self) -> bool:
        """Whether an unreadable file is an error."""
        return self._on_unreadable_file == "raise"

    def report(self, where: str, why: str) -> None:
        """Report a malformed record.

        Args:
            where: File and line.
            why: What is wrong with it.

        Raises:
            DataError: If on_malformed is "raise".
        """
        if self._on_malformed == "raise":
            raise DataError(f'{where}: {why}. Repair it, or skip and count such records with on_malformed="skip"')
        if where in self._records or len(self._records) >= _REMEMBERED:
            return
        self._records.add(where)
        self._warn(
            len(self._records),
            "malformed records",
            lambda: f"source {self._source}: skipped a malformed record: {where}: {why}",
        )

    def report_file(self, where: str, why: str, lost: str) -> None:
        """Report a file that cannot be read, or not to its end.

        Args:
            where: The file, and where in it reading ends.
            why: What is wrong with it.
            lost: How much is not read, in rows or bytes.

        Raises:
            DataError: If on_unreadable_file is "raise".
        """
        file = UnreadableFile(where, why, lost)
        if self.stops_at_files:
            raise DataError(
                f"{file}: repair or replace the file, leave it out, or read without what is lost with "
                'on_unreadable_file="skip"'
            )
        if where not in self._files and len(self._files) < _REMEMBERED:
            self._files[where] = file
            self._warn(
                len(self._files),
                "unreadable files",
                lambda: f"source {self._source}: skipped an unreadable file: {file}",
            )

    def _warn(self, count: int, what: str, describe: Callable[[], str]) -> None:
        if count <= _NAMED:
            _logger.warning("%s%s", describe(), "; further ones are only counted" if count == _NAMED else "")
        elif str(count).strip("0") == "1":
            at_least = "at least " if count == _REMEMBERED else ""
            _logger.warning("source %s: skipped %s%d %s so far", self._source, at_least, count, what)
