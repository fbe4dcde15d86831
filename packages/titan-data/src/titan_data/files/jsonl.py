"""JSON lines: one object per line, with the text under one of its keys."""

import json
from functools import partial
from itertools import islice

from titan_data.errors import DataError
from titan_data.files.compression import CorruptFileError
from titan_data.files.line_index import IndexFolder
from titan_data.files.lines import LineFormat
from titan_data.files.malformed import MalformedRecords
from titan_data.files.retry import Retry
from titan_data.files.storage import DataFile

_CHECKED = 20  # records looked at for the text's key before anything is read


class JsonLines(LineFormat):
    """JSON lines. A blank line, and a text that is null, are empty documents.

    Args:
        text_key: the key of the text.
        malformed: told of malformed records.
        retry: how often to try where the storage fails.
        index_folder: where indices are kept, if anywhere.
    """

    def __init__(
        self, text_key: str, malformed: MalformedRecords, retry: Retry, index_folder: IndexFolder | None
    ) -> None:
        super().__init__("jsonl", "line", partial(parse_record, text_key), malformed, retry, index_folder)
        self._text_key = text_key

    def check(self, file: DataFile) -> None:
        """Make sure that the file has lines of objects, and that the first of them have the text's key."""
        keys: set[str] = set()
        records = self.records(file)
        try:
            for record in islice(records, _CHECKED):
                if record.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    raise DataError(
                        f"{file.label} begins with a JSON array, not with a line per record: rewrite it, as with "
                        "`jq -c '.[]'`"
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
    """Take the text out of one line of JSON; a ValueError says what is wrong with it."""
    if not line or line.isspace():
        return ""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if text_key not in value:
        raise ValueError(f"no {text_key!r}; there is {', '.join(map(repr, value)) or 'nothing'}")
    text = value[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} holds {type(text).__name__}, not text")
    return text
