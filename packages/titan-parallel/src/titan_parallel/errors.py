"""The exception of titan-parallel."""


class LayoutError(ValueError):
    """A layout, plan or option that does not fit the machine or the model; the message says what to change."""
