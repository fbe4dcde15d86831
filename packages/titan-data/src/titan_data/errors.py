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


def is_failure(error: BaseException) -> bool:
    """Whether an error is one of the code that was called, rather than a request to stop.

    Libraries in Rust panic with exceptions that are not an `Exception`.
    """
    return not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
