"""Reading ahead in a thread, so that the next batch is ready when it is asked for. Called by `Loader`."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from titan_data.files.reading import ReadingThread

T = TypeVar("T")

_POLL_SECONDS = 0.5  # how often a thread that waits for a free slot checks whether it is to stop


class Prefetcher(Generic[T]):
    """Calls a function repeatedly in a thread, at most `depth` results ahead.

    An exception of the function is raised by `get` in its turn, after the results before it.

    Args:
        produce: Makes the next result. Must not hold the object that owns the prefetcher, or that is never freed.
        depth: How many results may wait.

    Attributes:
        ended: Whether `get` has raised an exception of the function; there are no more results.
        closed: Whether `close` was called.
    """

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        self._results: queue.Queue[tuple[T, None] | tuple[None, BaseException]] = queue.Queue(depth)
        self._stop = threading.Event()
        self.ended = self.closed = False
        # A daemon, so that a read that hangs cannot keep the process alive; the owner closes it before Python exits.
        self._thread = ReadingThread(
            target=_run, args=(produce, self._results, self._stop), name="titan-data-prefetch", daemon=True
        )
        self._thread.start()

    @property
    def reading(self) -> str | None:
        """The file that the thread is reading; None if it is not reading a file."""
        return self._thread.reading

    def get(self, patience: float, warn: Callable[[float], None]) -> T:
        """Wait for the next result, or raise what the function raised in its place.

        Args:
            patience: Seconds after which `warn` is called for the first time, and again each time that twice as many
                have passed.
            warn: Called with the number of seconds that have passed.
        """
        waited = 0.0
        while True:
            try:
                result, error = self._results.get(timeout=max(patience, waited))
                break
            except queue.Empty:
                waited += max(patience, waited)
                warn(waited)
        if error is not None:
            self.ended = True
            raise error
        return result  # type: ignore[return-value]  # there is a result if there is no error

    def close(self, timeout: float) -> bool:
        """Stop the thread; waiting results are dropped. May be called more than once.

        Args:
            timeout: Seconds to wait for the current call of the function.

        Returns:
            Whether the thread has ended. If not, it may still use what the function uses.
        """
        self.closed = True
        self._stop.set()
        if threading.current_thread() is self._thread:
            return False  # the garbage collector may free the owner in any thread, even in this one during a put
        while True:
            try:
                self._results.get_nowait()  # frees a slot, so that a waiting thread sees the stop at once
            except queue.Empty:
                break
        self._thread.join(timeout)
        return not self._thread.is_alive()


def _run(
    produce: Callable[[], T],
    results: "queue.Queue[tuple[T, None] | tuple[None, BaseException]]",
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        item: tuple[T, None] | tuple[None, BaseException]
        try:
            item = (produce(), None)
        except BaseException as error:
            item = (None, error)
        while not stop.is_set():
            try:
                results.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if item[1] is not None:
            return
