"""A tokenizer that fails, in a module that worker processes import quickly."""

import os
import signal

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
