"""Stopping in good order: the first signal asks, the second insists."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType


class StopSignal:
    """While entered, SIGTERM and SIGINT set a flag instead of ending the process; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # nothing of Python's shutdown: it may hang on what the user wants to leave
        self.received = signal.Signals(number)
        if os.environ.get("RANK", "0") == "0":
            # Only what is safe in a handler: no logging, whose lock the interrupted code may hold.
            text = f"\n{self.received.name}: finishing this step, then saving; once more ends at once\n"
            sys.stderr.flush()
            os.write(2, text.encode())
