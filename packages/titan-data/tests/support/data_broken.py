"""Tokenizers that fail, in a module that worker processes import quickly."""

import os
import signal
from typing import Any

from titan_data.tokenizers.base import ByteTokenizer


class BrokenTokenizer(ByteTokenizer):
    """Fails on one document, or ends its process there."""

    def __init__(self, end: bool = False) -> None:
        self.end = end

    def encode(self, text: str) -> list[int]:
        if "document 34" in text:
            if self.end:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no such letter")
        return super().encode(text)


class PanicError(BaseException):
    """As the panic of a library in Rust: not an Exception."""


class PanickingTokenizer(ByteTokenizer):
    """Panics on one document."""

    def encode(self, text: str) -> list[int]:
        if "document 34" in text:
            raise PanicError("index out of bounds")
        return super().encode(text)


class InterruptedWhenLoaded(ByteTokenizer):
    """Presses Ctrl-C in the worker process that loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load_interrupted, (os.getpid(),)


def load_interrupted(main: int) -> InterruptedWhenLoaded:
    if os.getpid() != main:
        os.kill(os.getpid(), signal.SIGINT)
    return InterruptedWhenLoaded()
