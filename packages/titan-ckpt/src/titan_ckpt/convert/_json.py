"""JSON from files that nobody vouches for: one reading or an error."""

import json
from pathlib import Path
from typing import Any

from titan_ckpt.convert._files import file_size
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import unique


def read_json(path: Path, max_bytes: int = 1 << 28) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        max_bytes: a longer file is refused unread.

    Returns:
        The object.

    Raises:
        CheckpointError: when it cannot be read, is too long, is no object, or leaves room for doubt: keys that occur
            twice, NaN or Infinity, nesting deeper than Python's stack.
    """
    file_size(path, max_bytes)
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} does not read ({error.strerror or error})") from error


def parse_json(data: bytes | str, what: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: its text.
        what: where it is from, for the message.

    Returns:
        The object.

    Raises:
        CheckpointError: when it is none; see `read_json`.
    """
    try:
        content = json.loads(data, object_pairs_hook=unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{what} is no JSON that can be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} holds a {type(content).__name__} where a JSON object is wanted")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
