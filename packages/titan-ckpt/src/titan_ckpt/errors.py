"""The one exception that callers of titan_ckpt need to know, and how errors of the system become it."""

from collections.abc import Iterator
from contextlib import contextmanager

from titan_ckpt.messages import printable_lines, reason_of

_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "Storage size calculation overflowed")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; the message says what, where and what to do.

    Control characters in the message are escaped: it may contain names from files.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable_lines(message))


@contextmanager
def system_errors(what: str) -> Iterator[None]:
    """Turn errors of the system into a CheckpointError: files, stores and memory.

    Args:
        what: What the block does and where, as an infinitive, e.g. "read /data/x".

    Raises:
        CheckpointError: If the block raises OSError or MemoryError, or torch cannot allocate.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"could not {what}: {reason_of(error)}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CheckpointError) or not _is_of_memory(error):
            raise
        raise CheckpointError(
            f"could not {what}: it does not fit into this machine's memory ({reason_of(error).splitlines()[0]}); read "
            "a slice of it, or use a machine with more memory"
        ) from error


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)
