"""What titan-data raises for anything that the user can put right."""

from collections.abc import Sequence


class DataError(ValueError):
    """Data, settings or a saved state cannot be used; the message says what to change."""


class ChangedDataError(DataError):
    """A saved state is of other data or settings.

    Attributes:
        changes: what would have to be allowed to go on all the same, as `Loader.load_state_dict` takes it.
    """

    def __init__(self, message: str, changes: Sequence[str]) -> None:
        super().__init__(message)
        self.changes = tuple(changes)
