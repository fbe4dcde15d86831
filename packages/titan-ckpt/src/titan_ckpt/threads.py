"""Helper threads that the package can always do without.

While the interpreter shuts down, Python starts no new threads and its executors refuse work, but a save in flight is
still finished then. So work is handed to these helpers only if they can be started; otherwise the caller does it.
Helpers are daemons: whoever needs a result waits for it.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")


def start_thread(name: str, run: Callable[..., object], *args: Any) -> bool:
    """Start a daemon thread; return False if none can be started (interpreter shutdown, limits of the system)."""
    try:
        threading.Thread(target=run, args=args, name=name, daemon=True).start()
    except RuntimeError:
        return False
    return True


def parallel_map(work: Callable[[T], S], items: Iterable[T], threads: int, name: str) -> list[S]:
    """Apply `work` to each item, in up to `threads` threads of which the caller's is one.

    Args:
        work: What to do.
        items: The items.
        threads: How many threads work at once, at most.
        name: Name of the threads.

    Returns:
        The results in the order of the items.

    Raises:
        BaseException: The first error of `work`, or an interrupt of the caller. Items that no thread has begun are left
            out then, and those that are being worked on are waited for: no thread works on an item any more when it is
            raised. A second interrupt, while they are waited for, is raised at once.
    """
    waiting, places = list(items), itertools.count()
    results: dict[int, S] = {}
    errors: list[BaseException] = []
    busy: set[object] = set()  # the helpers that may be working on an item
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run() -> None:
        while not errors and (place := next(places)) < len(waiting):  # `next` is atomic
            results[place] = work(waiting[place])

    def help_out() -> None:
        me = object()
        busy.add(me)  # before `errors` is read: who adds to `errors` and then finds nobody busy knows that nobody works
        try:
            run()
        except BaseException as error:
            errors.append(error)
        finally:
            busy.discard(me)
            ended.put(None)

    try:
        for _ in range(min(threads, len(waiting)) - 1):
            start_thread(name, help_out)
        run()
    except BaseException as error:
        errors.append(error)
    while busy:
        try:
            ended.get()
        except BaseException as interrupt:  # Ctrl-C, usually: a handler of a signal may raise anything
            if errors:
                raise interrupt from errors[0]
            errors.append(interrupt)
    if errors:
        raise errors[0]
    return [results[place] for place in range(len(waiting))]


class Result(Generic[T]):
    """The result of a call that a `Helper` was given."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._done = threading.Event()

    def run(self) -> None:
        """Make the call; nothing is raised here."""
        try:
            self._value.append(self._call())
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def get(self) -> T:
        """Wait for the call; return its value or raise its error."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value[0]


class Helper:
    """One thread that makes calls in the order in which they are given; without a thread the caller makes them."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Result[Any] | None] = queue.SimpleQueue()
        self._started = start_thread(name, _serve, self._calls)

    def submit(self, call: Callable[..., T], *args: Any) -> Result[T]:
        """Have a call made."""
        result = Result(lambda: call(*args))
        if self._started:
            self._calls.put(result)
        else:
            result.run()
        return result

    def close(self) -> None:
        """End the thread after the calls that it was given."""
        self._calls.put(None)

    def __del__(self) -> None:
        self.close()


def _serve(calls: "queue.SimpleQueue[Result[Any] | None]") -> None:
    while (result := calls.get()) is not None:
        result.run()
        del result  # or the buffers it holds would live until the next call
