"""Beginning or resuming a folder of token shards: whether it is of this job and of these input files, and its lock.

Called by `prepare`.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_data.errors import DataError
from titan_data.fingerprint import list_differences
from titan_data.shards.format import (
    HEADER_SIZE,
    UNFINISHED,
    Header,
    Job,
    shard_name,
    shard_size,
    token_dtype,
)
from titan_data.shards.inputs import RecordedInputs
from titan_data.shards.writer import STAGING, write_atomically
from titan_data.sources.base import Source


def begin_or_resume(
    folder: Path, job: Job, source: Source, *, checksum: bool
) -> tuple[list[Header], RecordedInputs | None]:
    """Check that the folder is empty or of this job; return the headers of its finished shards, and the input files."""
    record = folder / UNFINISHED
    if not record.exists():
        if others := sorted(entry.name for entry in folder.iterdir() if entry.name != record.name + STAGING):
            raise DataError(f"{folder} is not empty (it contains {others[0]}): choose another folder, or empty it")
        inputs = RecordedInputs.of(source, checksum=checksum)
        write_atomically(
            record, dump_record({**job.to_json(), **({} if inputs is None else {"inputs": inputs.to_json()})})
        )
        return [], inputs
    inputs, fields = read_record(record)
    try:
        saved = Job.from_json(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt_record(record, error) from None
    check_same_job(saved, job, folder)
    if inputs is not None:
        inputs.check(source, folder, checksum=checksum)
    headers: list[Header] = []
    while (path := folder / shard_name(len(headers))).exists():
        with path.open("rb") as file:
            header = Header.unpack(file.read(HEADER_SIZE), str(path))
        if path.stat().st_size != shard_size(header.documents, header.tokens, token_dtype(job.vocab_size)):
            raise DataError(f"{path} is corrupt: remove it and all later shards, and run the same command again")
        headers.append(header)
    return headers, inputs


def read_record(path: Path) -> tuple[RecordedInputs | None, dict[str, Any]]:
    """Read the record of a folder: its input files if there are any, and the other fields."""
    try:
        fields = json.loads(path.read_bytes())
        inputs = fields.pop("inputs", None)
        return None if inputs is None else RecordedInputs.from_json(inputs), fields
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt_record(path, error) from None


def _corrupt_record(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is corrupt ({error!r}): empty the folder and start again")


def dump_record(fields: dict[str, Any]) -> bytes:
    """Serialize what `read_record` reads."""
    return (json.dumps(fields, indent=1) + "\n").encode()


def check_same_job(saved: Job, job: Job, folder: Path) -> None:
    """Check that a folder was made from what is to be prepared.

    Raises:
        DataError: If not; all differences are listed.
    """
    differences = [f"source: {line}" for line in list_differences(saved.source, job.source)]
    was, now = vars(saved), vars(job)
    differences += [
        f"{key}: was {was[key]!r}, now {now[key]!r}" for key in was if key != "source" and was[key] != now[key]
    ]
    if differences:
        raise DataError(
            f"{folder} was prepared from other data:\n  " + "\n  ".join(differences) + "\nChoose another folder."
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against a second call; the system releases the lock when this process ends in any way."""
    try:
        import fcntl  # here: Windows has none
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another titan-data prepare is writing to {folder}: wait until it has finished") from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(descriptor)
