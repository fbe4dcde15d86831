"""The one exception that callers of titan_ckpt need to know."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; the message says what, where and what to do."""
