"""Strict JSON parsing of untrusted files: rejects duplicate keys, NaN and deep nesting."""

import json
from pathlib import Path
from typing import Any

from titan_ckpt.convert._files import file_size
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import check_nesting, reject_duplicates
from titan_ckpt.messages import reason_of


def read_json(path: Path, max_bytes: int = 1 << 24) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        max_bytes: A longer file is refused without reading it.

    Returns:
        The object.

    Raises:
        CheckpointError: If it cannot be read, is too long, is not a JSON object, or is ambiguous: duplicate keys, NaN
            or Infinity, nesting deeper than 200 levels.
    """
    file_size(path, max_bytes)
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error


def parse_json(data: bytes | str, what: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: The text.
        what: Where it comes from, for the message.

    Returns:
        The object.

    Raises:
        CheckpointError: If it is invalid; see `read_json`.
    """
    try:
        content = json.loads(data, object_pairs_hook=reject_duplicates, parse_constant=_refuse_constant)
        check_nesting(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{what}: invalid JSON ({reason_of(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what}: expected a JSON object, found a {type(content).__name__}")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
