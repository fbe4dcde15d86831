"""Retries of storage that fails for a moment: how many, how far apart, and when a silent read counts as failed.

fsspec itself does not retry (single file systems, such as s3fs, retry requests), has no common time limit for a server
that stops answering, and does not reopen a file after an error. That is here and in `storage.StorageReader`.
"""

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

# HTTP client errors that are temporary: timeout, "too early" and "too many requests".
_TEMPORARY_STATUSES = frozenset({408, 425, 429})


@dataclass(frozen=True)
class Retry:
    """How reads are retried: each wait is twice the one before, less a random part of up to a half.

    The random part keeps thousands of ranks that failed together from retrying together.

    Attributes:
        attempts: How often a read is attempted, including the first time; a success resets the count.
        delay: Seconds before the second attempt.
        max_delay: Upper limit of a wait, in seconds.
        stall: Seconds without an answer after which a read from remote storage counts as failed.
        sleep: The function that waits; for tests.

    Raises:
        DataError: If a number is out of range.
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
            failures: How many attempts have failed, at least 1.
        """
        longest = min(self.max_delay, self.delay * 2.0 ** min(failures - 1, 60))
        # SystemRandom, so that retries do not advance the caller's global random generator.
        self.sleep(longest * random.SystemRandom().uniform(0.5, 1.0))


class AttemptsFailedError(Exception):
    """Every attempt has failed, or a retry is useless; the last error is the cause.

    Attributes:
        failures: Number of failed attempts.
        error: The last error.
        temporary: Whether that may be gone later.
    """

    def __init__(self, failures: int, error: Exception, *, temporary: bool) -> None:
        super().__init__(describe_error(error))
        self.failures, self.error, self.temporary = failures, error, temporary


def call_with_retries(function: Callable[[], T], retry: Retry) -> T:
    """Call a function until it succeeds.

    Args:
        function: Called again after each temporary error.
        retry: How often, and how far apart.

    Returns:
        What the function returns. A DataError of it is raised as it is.

    Raises:
        AttemptsFailedError: If the attempts are used up, or an error is not temporary.
    """
    failures = 0
    while True:
        try:
            return function()
        except DataError:
            raise
        except Exception as error:
            failures += 1
            temporary = may_pass(error)
            if not temporary or failures == retry.attempts:
                raise AttemptsFailedError(failures, error, temporary=temporary) from error
        retry.wait(failures)


def may_pass(error: Exception) -> bool:
    """Whether the same read may succeed later; False if the file is missing or forbidden."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotImplementedError | ImportError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in _TEMPORARY_STATUSES)


def describe_error(error: Exception) -> str:
    """Describe an error in one line, without the queries of web addresses, which may contain secrets."""
    message = " ".join(re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", str(error)).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function with a time limit.

    Args:
        seconds: The time limit.
        function: Called in its own thread, which is abandoned when the time is up: it must not change anything that
            others use.

    Returns:
        What the function returns; what it raises is raised here.

    Raises:
        TimeoutError: If it took longer.
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
    return value  # type: ignore[return-value]  # without an error it is what the function returned
