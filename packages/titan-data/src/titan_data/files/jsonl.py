"""JSON lines: one object per line, with the text under one key."""

import json
from collections.abc import Iterable
from functools import partial
from itertools import islice

from titan_data.files.compression import CorruptFileError, WrongSchemaError, first_bytes
from titan_data.files.lines import LineFormat
from titan_data.files.malformed import Findings
from titan_data.files.options import StorageOptions
from titan_data.files.storage import DataFile
from titan_data.files.text_key import MISSING, find_value, list_keys

_CHECKED = 20  # records checked for the text's key before anything is read


class JsonLines(LineFormat):
    """JSON lines. Blank lines and null texts are empty documents.

    Args:
        text_key: The key of the text, or a path of keys joined by dots.
        findings: Collects malformed records and unreadable files.
        storage: How storage is read.
    """

    def __init__(self, text_key: str, findings: Findings, storage: StorageOptions) -> None:
        super().__init__("jsonl", "line", partial(parse_record, text_key), findings, storage)
        self._text_key = text_key

    def check(self, file: DataFile, head: bytes) -> None:
        """Check that the file has one object per line, and that one of the first has the text's key."""
        lines = first_bytes(file, head).split(b"\n")
        if len(head) != file.size:
            lines = lines[:-1]  # cut off
        if any(lines):
            self._check_records(file, lines)
            return
        records = self.records(file)  # the first is longer than the head
        try:
            self._check_records(file, records)
        except CorruptFileError as error:
            if isinstance(error, WrongSchemaError):
                raise
            # Reported when it is read: what comes before the corrupt data can be used.
        finally:
            records.close()

    def _check_records(self, file: DataFile, records: Iterable[bytes]) -> None:
        keys: set[str] = set()
        for record in islice(records, _CHECKED):
            if record.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise WrongSchemaError(
                    "begins with a JSON array, not with one object per line: convert it, "
                    "for example with `jq -c '.[]'`",
                    _bytes(file),
                )
            try:
                value = json.loads(record)
                if isinstance(value, dict):
                    if find_value(value, self._text_key) is not MISSING:
                        return
                    keys.update(list_keys(value))
            except (ValueError, RecursionError):
                continue
        if keys:
            raise WrongSchemaError(
                f"has no {self._text_key!r} in its first records; set text_key to one of: {', '.join(sorted(keys))}",
                _bytes(file),
            )


def _bytes(file: DataFile) -> str:
    return "all of it" if file.size is None else f"up to {file.size:,} bytes"


def parse_record(text_key: str, line: str) -> str:
    """Extract the text from one line of JSON; a ValueError says what is wrong with it."""
    if not line or line.isspace():
        return ""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    text = find_value(value, text_key)
    if text is MISSING:
        keys = f"its keys are {', '.join(map(repr, list_keys(value)))}" if value else "it is empty"
        raise ValueError(f"an object without {text_key!r}; {keys}")
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is of type {type(text).__name__}, not a string")
    return text
