"""Reading ahead in a thread of its own, so that the next batch lies ready when it is asked for."""

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Generic, TypeVar

from titan_data.files.storage import DataFile

T = TypeVar("T")

_FRAMES = 4  # that are shown of a thread that hangs
_POLL_SECONDS = 0.5  # how often a thread that waits for room looks whether it is to stop


class Prefetcher(Generic[T]):
    """Calls a function over and over in a thread, at most `depth` results ahead.

    An exception of the function comes out of `get` in its turn, after the results before it.

    Args:
        produce: makes the next result. Must not hold the object that owns the prefetcher, lest that be never freed.
        depth: how many results may wait.

    Attributes:
        ended: whether an exception of the function has come out; there will be no more results.
        closed: whether the thread was told to stop.
    """

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        self._results: queue.Queue[tuple[T, None] | tuple[None, BaseException]] = queue.Queue(depth)
        self._stop = threading.Event()
        self.ended = self.closed = False
        # A daemon, as a read that hangs must not keep the process alive; the owner closes it before Python goes down.
        self._thread = threading.Thread(
            target=_run, args=(produce, self._results, self._stop), name="titan-data-prefetch", daemon=True
        )
        self._thread.start()

    def get(self, patience: float, warn: Callable[[float], None]) -> T:
        """Wait for the next result, or raise what the function raised in its place.

        Args:
            patience: seconds after which `warn` is called for the first time, and again each time that twice as many
                have passed.
            warn: told how many seconds have passed.
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
        return result  # type: ignore[return-value]  # there is a result where there is no error

    def close(self, timeout: float) -> bool:
        """Stop the thread; results that wait are lost. Safe to call more than once.

        Args:
            timeout: seconds to wait for the call under way.

        Returns:
            Whether the thread has ended. If not, it may still use what the function uses.
        """
        self.closed = True
        self._stop.set()
        if threading.current_thread() is self._thread:
            return False  # the garbage collector may free the owner from any thread, even from in the middle of a put
        while True:
            try:
                self._results.get_nowait()  # so that a thread that waits for room sees the stop at once
            except queue.Empty:
                break
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def describe(self) -> str:
        """Say where the thread is, outermost call first, and in which file if one is being read."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        calls = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
        where = " > ".join(f"{call.name} ({os.path.basename(call.filename)}:{call.lineno})" for call in calls)
        file = _file_at(frame)
        return where if file is None else f"{where}, in {file}"


def _file_at(frame: FrameType | None) -> str | None:
    """Name the file that the innermost of the calls is about."""
    while frame is not None:
        for value in frame.f_locals.values():
            if isinstance(value, DataFile):
                return value.label
            if isinstance(value, Path):
                return str(value)
        frame = frame.f_back
    return None


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
