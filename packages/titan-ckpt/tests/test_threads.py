"""Work that is divided among threads: its results, its errors, and interrupts at any place."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from titan_ckpt.threads import parallel_map


class Interrupted(BaseException):
    """Raised by a handler of a signal."""


@contextmanager
def interrupts() -> Iterator[None]:
    """Let SIGUSR1 raise `Interrupted` in the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class Work:
    """Items that the helpers hold until they are released; the caller's own are done at once."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.held, self.release = threading.Event(), threading.Event()

    def __call__(self, item: int) -> int:
        self.begun.append(item)
        if threading.current_thread() is not threading.main_thread():
            self.held.set()
            self.release.wait()
        else:
            self.held.wait()  # so that a helper has an item for certain
        self.ended.append(item)
        return -item


def signal_when(ready: threading.Event, then: threading.Event | None = None) -> threading.Thread:
    def send() -> None:
        ready.wait()
        pause = threading.Event()
        pause.wait(0.3)  # the main thread waits for its helpers by then
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        pause.wait(0.3)
        if then is not None:
            then.set()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_results_are_in_the_order_of_the_items(threads: int) -> None:
    assert parallel_map(lambda item: -item, range(100), threads, "test") == [-item for item in range(100)]
    assert parallel_map(lambda item: item, [], threads, "test") == []


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_no_thread_works_when_an_error_is_raised(threads: int) -> None:
    working: set[int] = set()

    def work(item: int) -> None:
        working.add(item)
        try:
            if item == 5:
                raise ValueError("five")
        finally:
            working.remove(item)

    with pytest.raises(ValueError, match="five"):
        parallel_map(work, range(1000), threads, "test")
    assert not working


def test_an_interrupt_of_the_wait_is_raised_when_no_thread_works() -> None:
    work = Work()
    with interrupts():
        sender = signal_when(work.held, then=work.release)
        with pytest.raises(Interrupted):
            parallel_map(work, range(2), 2, "test")
    assert sorted(work.begun) == sorted(work.ended)
    sender.join()


def test_what_has_not_begun_is_left_out() -> None:
    work = Work()

    def slow(item: int) -> int:
        if threading.current_thread() is threading.main_thread():
            work.held.wait()
            raise Interrupted  # as Ctrl-C in the caller's own share
        return work(item)

    def release() -> None:
        work.held.wait()
        threading.Event().wait(0.3)
        work.release.set()

    threading.Thread(target=release, daemon=True).start()
    with pytest.raises(Interrupted):
        parallel_map(slow, range(1000), 3, "test")
    assert sorted(work.begun) == sorted(work.ended)
    assert len(work.begun) <= 3


def test_a_second_interrupt_ends_the_wait_at_once() -> None:
    work = Work()
    with interrupts():
        signal_when(work.held)

        def again() -> None:
            work.held.wait()
            threading.Event().wait(1.0)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        sender = threading.Thread(target=again, daemon=True)
        sender.start()
        with pytest.raises(Interrupted):
            parallel_map(work, range(2), 2, "test")
    assert len(work.ended) < len(work.begun)  # the helper still holds its item
    work.release.set()
    sender.join()
