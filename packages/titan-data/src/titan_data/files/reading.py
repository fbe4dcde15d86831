"""Which file a thread is reading, so that a warning about a read that hangs can name it.

The storage reader sets it, `batching.prefetch` runs the loader in a `ReadingThread` and reports it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadingThread(threading.Thread):
    """A thread that knows which file it is reading.

    Attributes:
        reading: The file, as messages call it; None while no file is read.
    """

    reading: str | None = None


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Mark a file as being read by the current thread, if that is a `ReadingThread`."""
    thread = threading.current_thread()
    if not isinstance(thread, ReadingThread):
        yield
        return
    before, thread.reading = thread.reading, label
    try:
        yield
    finally:
        thread.reading = before
