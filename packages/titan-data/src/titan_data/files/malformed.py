"""Malformed records: reported by file and line and counted, or an error. Called by the formats."""

import logging
from typing import Literal

from titan_data.errors import DataError

OnMalformed = Literal["skip", "raise"]

_logger = logging.getLogger("titan_data")
_NAMED = 5  # records with a warning each; then a total at 10, 100, 1000, …
_REMEMBERED = 100_000  # records remembered, so that a second epoch does not count them again


class MalformedRecords:
    """Counts the malformed records of one source.

    Args:
        source: The source's name, for the warnings.
        on_malformed: "skip" to warn and continue, "raise" to stop.
    """

    def __init__(self, source: str, on_malformed: OnMalformed) -> None:
        self._source = source
        self._on_malformed = on_malformed
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """Number of malformed records so far; stops at 100,000."""
        return len(self._seen)

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
        if where in self._seen or len(self._seen) >= _REMEMBERED:
            return
        self._seen.add(where)
        count = len(self._seen)
        if count <= _NAMED:
            more = ""
            if count == _NAMED:
                more = "; further ones are only counted"
            _logger.warning("source %s: skipped a malformed record: %s: %s%s", self._source, where, why, more)
        elif str(count).strip("0") == "1":
            at_least = "at least " if count == _REMEMBERED else ""
            _logger.warning("source %s: skipped %s%d malformed records so far", self._source, at_least, count)
