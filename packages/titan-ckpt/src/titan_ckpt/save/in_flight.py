"""A save from the instant its data is fixed until it has ended, whoever runs it and however it ends.

Called by the checkpointer. The states of a `Save`:

    waiting    its data is fixed, nobody has begun to write it
    running    in its own thread, or in the caller's
    ended      published, skipped or failed

The step from waiting to running is one atomic operation, so a save is run once: by its thread, or by the first who
waits for it if the thread could not be started. An exception at any line leaves the save in one of these states. A
save's host buffer is its own until it has ended. `Flight` holds the save in flight for as long as a Checkpointer
exists, and makes sure that a program which just ends either finishes it or says that it did not.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from titan_ckpt.errors import CheckpointError
from titan_ckpt.save.host_buffer import HostBuffer

_LOOK_EVERY = 0.5  # seconds between looks at whether a save's thread is alive


@dataclass(frozen=True)
class SaveEnd:
    """How a save ended.

    Attributes:
        step: The step.
        path: Path or URL of its checkpoint.
        seconds: Time from the call of `save` to the end.
        error: Why it was not saved; None if it was.
    """

    step: int
    path: str
    seconds: float
    error: BaseException | None


class Deadline:
    """The time limit of one save, counted from its construction."""

    def __init__(self, what: str, seconds: float | None) -> None:
        self._what, self.seconds, self._started = what, seconds, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the save began."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float | None:
        """Seconds left, at least 0; None without a limit."""
        return None if self.seconds is None else max(0.0, self.seconds - self.elapsed)

    def check(self) -> None:
        """Check the time.

        Raises:
            CheckpointError: If the limit is exceeded.
        """
        if self.left == 0.0:
            raise CheckpointError(
                f"{self._what} is not finished after {self.seconds:g} s, the limit save_timeout: raise the limit, or "
                "find out why the storage is slow"
            )


class _Runner:
    """One attempt to run a save."""

    def __init__(self, thread: threading.Thread) -> None:
        self.thread = thread


class Save:
    """One save whose data is fixed. `run` or `start` it, then `finish`.

    Attributes:
        step: The step.
    """

    def __init__(
        self,
        step: int,
        work: Callable[[], None],
        deadline: Deadline,
        on_end: Callable[[BaseException | None], None],
        *,
        lenient: bool = False,
    ) -> None:
        """Describe the save; nothing runs yet.

        Args:
            step: The step.
            work: Writes and publishes; it may raise anything.
            deadline: Its time limit.
            on_end: Called once in the thread that ran it, with the error or None, before `finish` returns.
            lenient: Whether a CheckpointError is reported to `on_end` only, and never raised.
        """
        self.step = step
        self._work: Callable[[], None] | None = work
        self._on_end: Callable[[BaseException | None], None] | None = on_end
        self._deadline, self._lenient = deadline, lenient
        self._runner: dict[str, _Runner] = {}  # at most one; `setdefault` decides who, and is atomic
        self._ended = threading.Event()
        self._succeeded = False
        self._failure: BaseException | None = None
        self._told = False

    @property
    def ended(self) -> bool:
        """Whether it no longer runs and never will."""
        if self._ended.is_set():
            return True
        runner = self._runner.get("")
        if runner is None:
            return False
        # Normally the event is set. An exception at just the wrong line may have ended the runner before that.
        return runner.thread is threading.current_thread() or not runner.thread.is_alive()

    def start(self) -> None:
        """Run it in a thread of its own, which the interpreter joins before it exits."""
        thread = threading.Thread(target=self._run_in_thread, name=f"titan-ckpt-save-{self.step}")
        try:
            thread.start()
        except RuntimeError:  # no thread can be started: the first who waits runs it
            return

    def run(self) -> None:
        """Run it in this thread, unless another one has begun to.

        Raises:
            BaseException: What it failed with.
        """
        if self._take_turn():
            try:
                self._execute()
            except CheckpointError:
                if not self._lenient:
                    raise
            finally:
                self._told = True  # by raising it

    def finish(self) -> None:
        """Wait until it has ended; run it here if its thread never began. An interrupted wait can be repeated.

        Raises:
            CheckpointError: If it failed and nobody was told yet, or if its time is up; then it may still end later.
            BaseException: What it failed with, if it ran here.
        """
        self.run()
        while not self.ended:
            left = self._deadline.left
            self._ended.wait(_LOOK_EVERY if left is None else min(_LOOK_EVERY, left))
            if not self.ended:
                self._deadline.check()
        error = self.untold_failure()
        if error is not None:
            try:
                raise error
            finally:
                self._told = True

    def untold_failure(self) -> CheckpointError | None:
        """Return why it failed, unless somebody was told already."""
        if not self.ended or self._succeeded or self._told:
            return None
        failure = self._failure
        if isinstance(failure, CheckpointError):
            return None if self._lenient else failure
        reason = "it was interrupted" if failure is None else f"{type(failure).__name__}: {failure}"
        error = CheckpointError(f"step {self.step} was not saved: {reason}")
        error.__cause__ = failure
        return error

    def _take_turn(self) -> bool:
        me = _Runner(threading.current_thread())
        return self._runner.setdefault("", me) is me

    def _run_in_thread(self) -> None:
        if self._take_turn():
            try:
                self._execute()
            except BaseException:
                return  # kept, and raised by the next call of the Checkpointer

    def _execute(self) -> None:
        work, self._work = self._work, None  # what they hold is freed as soon as it has ended
        on_end, self._on_end = self._on_end, None
        assert work is not None
        assert on_end is not None
        try:
            work()
            self._succeeded = True
        except BaseException as error:
            self._failure = error
            raise
        finally:
            try:
                on_end(self._failure)
            finally:
                self._ended.set()


class Flight:
    """The save in flight of one Checkpointer, and the host buffer that the next one may use.

    It outlives a Checkpointer that was dropped without `close`, until its save has ended.

    Attributes:
        current: The last save that was begun; None before the first.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._kept = True  # whether there is a Checkpointer that may need the buffer again
        atexit.register(self._finish_at_exit)
        self.current: Save | None = None
        self.spare: HostBuffer | None = None  # a buffer that belongs to no save

    def take_buffer(self) -> HostBuffer:
        """Return a buffer that is the caller's alone."""
        buffer, self.spare = self.spare, None
        return buffer or HostBuffer()

    def give_back(self, buffer: HostBuffer) -> None:
        """Keep a buffer for the next save: the one it belonged to has ended."""
        if self._kept:
            self.spare = buffer

    def close(self) -> None:
        """Let go of everything; the Checkpointer is closed."""
        self._kept, self.spare = False, None
        atexit.unregister(self._finish_at_exit)

    def drop(self) -> None:
        """Take leave of a Checkpointer that is dropped without `close`, and say if its save failed.

        If the save has not ended, that is said when the program ends.
        """
        self._kept, self.spare = False, None
        save = self.current
        if save is None or save.ended or os.getpid() != self._process:
            self.close()
            if save is not None and os.getpid() == self._process and (error := save.untold_failure()) is not None:
                _say(str(error))

    def _finish_at_exit(self) -> None:
        """Finish the save in flight, or say that it is lost; the interpreter has joined its thread already."""
        save = self.current
        if save is None or os.getpid() != self._process:  # a fork has none of the parent's threads
            return
        try:
            if not save.ended:
                _say(f"finishing the save of step {save.step}; Ctrl-C abandons it")
            save.finish()
        except CheckpointError as error:
            _say(str(error))
        except BaseException as error:
            _say(f"step {save.step} was abandoned by {type(error).__name__} while it was written")


def _say(text: str) -> None:
    """Write to stderr: there is nobody left to raise an error to, and logging may be shut down."""
    if sys.stderr is not None:
        print(f"titan-ckpt: {text}", file=sys.stderr, flush=True)
