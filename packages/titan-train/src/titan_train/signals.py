"""Graceful shutdown: the first SIGTERM or SIGINT is recorded, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType


class StopSignal:
    """Context in which the first SIGTERM or SIGINT is recorded, for the loop to save and stop.

    A second signal ends the process at once, with exit code 128 + the signal's number.

    Attributes:
        received: The signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # without Python's shutdown, which may hang in what the user wants to end
        self.received = signal.Signals(number)
        if os.environ.get("RANK", "0") == "0":
            # Only what is safe in a handler: no logging, whose lock the interrupted code may hold.
            text = f"\n{self.received.name}: finishing this step, then saving; a second signal ends at once\n"
            sys.stderr.flush()
            os.write(2, text.encode())
