"""Text from and for people: messages are escaped, since names in them come from files of others, and have a reason.

Used for errors, log records, paths and the command line. Nothing here needs torch.
"""

import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    """Escape control characters, which could send commands to a terminal, and line breaks, which could forge a line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """Escape a message of one or several lines.

    A line break stays only before an indented line: so a message can list what it is about, and no name in it can begin
    a line that looks like another message.
    """
    first, *rest = text.split("\n")
    lines = [printable(first)]
    for line in rest:
        if line.startswith("  "):
            lines.append(printable(line))
        else:
            lines[-1] += f"\\n{printable(line)}"
    return "\n".join(lines)


def reason_of(error: BaseException) -> str:
    """Return the type of an error and what it says, which may be nothing."""
    kind, text = type(error).__name__, str(error)
    return f"{kind}: {text}" if text else kind


def local_path(text: str | Path) -> Path:
    """Return a path as the user gave it, with `~` for the home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user: it may be the name of a file
        return Path(text)


class EscapingLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose messages are escaped after their arguments are filled in."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message; see `logging.Logger.log`."""
        if self.isEnabledFor(level):
            text = str(msg) % args if args else str(msg)
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            self.logger.log(level, "%s", printable_lines(text), **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return both unchanged."""
        return msg, kwargs


def get_logger(name: str) -> EscapingLogger:
    """Return the logger of a module."""
    return EscapingLogger(logging.getLogger(name), {})
