"""The errors of titan-data.

ValueError
  DataError             data, settings or a state cannot be used
    ChangedDataError    a state does not belong to these data or settings
"""

from collections.abc import Sequence


class DataError(ValueError):
    """Data, settings or a saved state cannot be used; the message says what to change."""


class ChangedDataError(DataError):
    """A saved state belongs to other data or settings.

    Attributes:
        changes: The `allow_changes` with which `Loader.load_state_dict` would accept the state.
    """

    def __init__(self, message: str, changes: Sequence[str]) -> None:
        super().__init__(message)
        self.changes = tuple(changes)
