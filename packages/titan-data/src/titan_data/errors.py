"""The one exception of this package."""


class DataError(ValueError):
    """Data, a setting or a saved state cannot be used; the message says what to change."""
