"""Trying again when storage fails for a moment: how often, how long apart, and when a silent read counts as failed."""

import queue
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from titan_data.errors import DataError

T = TypeVar("T")

# Client errors of HTTP that pass by themselves: a timeout, "too early" and "too many requests".
_PASSING_STATUSES = frozenset({408, 425, 429})


@dataclass(frozen=True)
class Retry:
    """How reading goes on after a failure: each wait is twice the one before, less a random part of up to a half.

    The random part keeps thousands of ranks that failed together from coming back together.

    Attributes:
        attempts: how often a read is tried, the first time included; each success starts the count afresh.
        delay: seconds before the second attempt.
        max_delay: seconds that no wait exceeds.
        stall: seconds without an answer after which a read from remote storage counts as failed.
        sleep: what waits; for tests.
    """

    attempts: int = 6
    delay: float = 1.0
    max_delay: float = 60.0
    stall: float = 120.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.delay < 0 or self.max_delay < 0 or self.stall <= 0:
            raise DataError(f"retrying needs attempts >= 1, delays >= 0 and stall > 0: {self}")

    def wait(self, failures: int) -> None:
        """Sleep before the next attempt.

        Args:
            failures: how many attempts have failed, at least 1.
        """
        longest = min(self.max_delay, self.delay * 2.0 ** min(failures - 1, 60))
        # Not the global generator: a program's own random numbers must not depend on the weather of the network.
        self.sleep(longest * random.SystemRandom().uniform(0.5, 1.0))


def may_pass(error: Exception) -> bool:
    """Whether the same read may succeed later; not so where the file is gone or forbidden."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotImplementedError | ImportError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUSES)


def describe_error(error: Exception) -> str:
    """Say in one line what happened, without the queries of web addresses: these may hold secrets."""
    message = " ".join(re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", str(error)).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function, but wait for it no longer than so many seconds.

    Args:
        seconds: how long to wait.
        function: called in a thread of its own, which is abandoned when the time is up: it must change nothing that
            others use.

    Returns:
        What the function returns; what it raises is raised here.

    Raises:
        TimeoutError: it took longer.
    """
    outcome: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True, name="titan-data read").start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer for {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # None is what the function returned, then
