"""Records that cannot be used: named and counted, or a reason to stop."""

import logging
from typing import Literal

from titan_data.errors import DataError

OnMalformed = Literal["skip", "raise"]

_logger = logging.getLogger("titan_data")
_NAMED = 5  # each with a warning of its own; after them a total at 10, 100, 1000, …
_REMEMBERED = 100_000  # places kept, so that a second epoch counts none of them again


class MalformedRecords:
    """Counts the malformed records of one source.

    Args:
        source: the source's name, for the warnings.
        on_malformed: "skip" to warn and go on, "raise" to stop.
    """

    def __init__(self, source: str, on_malformed: OnMalformed) -> None:
        if on_malformed not in ("skip", "raise"):
            raise DataError(f'on_malformed is "skip" or "raise", not {on_malformed!r}')
        self._source = source
        self._on_malformed = on_malformed
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """Number of malformed records so far; stops at 100,000."""
        return len(self._seen)

    def report(self, where: str, why: str) -> None:
        """Note a malformed record.

        Args:
            where: file and line.
            why: what is wrong there.

        Raises:
            DataError: malformed records are to stop the run.
        """
        if self._on_malformed == "raise":
            raise DataError(
                f'{where}: {why}. Mend it, or have such records skipped and counted with on_malformed="skip"'
            )
        if where in self._seen or len(self._seen) >= _REMEMBERED:
            return
        self._seen.add(where)
        count = len(self._seen)
        if count <= _NAMED:
            more = ""
            if count == _NAMED:
                more = "; further ones will only be counted"
            _logger.warning("source %s: skipped a malformed record: %s: %s%s", self._source, where, why, more)
        elif str(count).strip("0") == "1":
            at_least = "at least " if count == _REMEMBERED else ""
            _logger.warning("source %s: skipped %s%d malformed records so far", self._source, at_least, count)
