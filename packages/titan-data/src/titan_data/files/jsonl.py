"""JSON lines: one object per line, with the text under one key."""

import json
from functools import partial
from itertools import islice

from titan_data.errors import DataError
from titan_data.files.compression import CorruptFileError
from titan_data.files.lines import LineFormat
from titan_data.files.malformed import MalformedRecords
from titan_data.files.options import StorageOptions
from titan_data.files.storage import DataFile

_CHECKED = 20  # records checked for the text's key before anything is read


class JsonLines(LineFormat):
    """JSON lines. Blank lines and null texts are empty documents.

    Args:
        text_key: The key of the text.
        malformed: Collects malformed records.
        storage: How storage is read.
    """

    def __init__(self, text_key: str, malformed: MalformedRecords, storage: StorageOptions) -> None:
        super().__init__("jsonl", "line", partial(parse_record, text_key), malformed, storage)
        self._text_key = text_key

    def check(self, file: DataFile) -> None:
        """Check that the file has one object per line, and that the first of them have the text's key."""
        keys: set[str] = set()
        records = self.records(file)
        try:
            for record in islice(records, _CHECKED):
                if record.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    raise DataError(
                        f"{file.label} begins with a JSON array, not with one object per line: convert it, "
                        "for example with `jq -c '.[]'`"
                    )
                try:
                    value = json.loads(record)
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict):
                    if self._text_key in value:
                        return
                    keys.update(value)
        except CorruptFileError:
            pass  # reported when it is read
        finally:
            records.close()
        if keys:
            raise DataError(
                f"{file.label} has no {self._text_key!r} in its first records; set text_key to one of: "
                + ", ".join(sorted(keys))
            )


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
    if text_key not in value:
        keys = f"its keys are {', '.join(map(repr, value))}" if value else "it is empty"
        raise ValueError(f"an object without {text_key!r}; {keys}")
    text = value[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is of type {type(text).__name__}, not a string")
    return text
