"""What titan-parallel raises for a layout or plan that cannot work."""


class LayoutError(ValueError):
    """A layout that does not fit the machine or the model; the message says which numbers to change."""
