"""`load_files`: JSON lines, Parquet and plain text as a source, from this machine or wherever fsspec reaches."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from titan_data.errors import DataError
from titan_data.files.base import FileFormat
from titan_data.files.compression import CorruptFileError, WrongSchemaError, compression_of, require_compression
from titan_data.files.counts import RecordCounts
from titan_data.files.glob import find_files, has_wildcard, source_name
from titan_data.files.inputs import InputFiles
from titan_data.files.jsonl import JsonLines
from titan_data.files.line_index import IndexDirectory
from titan_data.files.lines import LineFormat
from titan_data.files.malformed import Findings
from titan_data.files.options import Format, Parsing, StorageOptions
from titan_data.files.parquet import Parquet
from titan_data.files.records import FileRecords, FileStream
from titan_data.files.retry import Retry
from titan_data.files.storage import DataFile, digest_sample
from titan_data.files.whole_file import WholeFiles
from titan_data.fingerprint import Fingerprint

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_THREADS = 16  # files checked concurrently
_SHOWN = 5  # unreadable files named in a message


def load_files(
    patterns: str | Path | Sequence[str | Path],
    *,
    text_key: str = "text",
    streaming: bool = False,
    shards: int = 32,
    name: str | None = None,
    parsing: Parsing | None = None,
    storage: StorageOptions | None = None,
) -> FileRecords | FileStream:
    r"""Open text files as a source: JSON lines, Parquet, or plain text, uncompressed, `.gz` or `.zst`.

    Without `streaming` the documents can be shuffled. That works for text files that are one document each, for
    uncompressed JSON lines and text on this machine (they are scanned once at the start to find where each record
    begins, unless `storage.index_directory` has an index: 8 bytes of memory per record), and for Parquet (each read
    decodes a complete row group, so shuffling is only fast while the decoded texts fit into `storage.cache_bytes`).
    Everything else, and what is too large to scan, needs `streaming`: the documents come in the order of their files,
    unshuffled. Or prepare token shards.

    A malformed record (invalid JSON, no `text_key`, no text in it, invalid UTF-8) becomes an empty document, which a
    loader skips: the numbers of the other documents do not change. A corrupt compressed file ends where it is corrupt;
    in a corrupt Parquet row group the rest of the rows are empty. Such files are listed in `unreadable`, with what is
    lost; `malformed` is the number of malformed records.

    Args:
        patterns: Paths, globs or URLs that fsspec knows (`s3://…`, `https://…`, `hf://…`).
        text_key: Key of the text in JSON lines, or its column in Parquet; a path for nested ones ("meta.text").
        streaming: Read the documents in order instead of by index.
        shards: With streaming, number of logical shards that the files are distributed over; at most one per file. A
            stream's order depends on it.
        name: The source's name; by default the end of the first pattern. A name that is given is part of the source's
            identity; one made of a folder and wildcards is not. See `TokenShards`.
        parsing: How files become documents; `Parsing()` if None.
        storage: How storage is read; `StorageOptions()` if None.

    Returns:
        A random-access source, or a stream. Files are sorted by path, numbers in numerical order (part-2 before
        part-10), pattern by pattern. The fingerprint consists of their names, sizes and samples of their contents.

    Raises:
        DataError: If a pattern matches nothing, the format is unknown or differs between files, no file can be read and
            has `text_key` (with on_unreadable_file="raise": not every file), records cannot be read in any order, or an
            extra is not installed.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "notes.jsonl")
        >>> _ = path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
        >>> notes = load_files(path)
        >>> notes.name, len(notes), notes[1]
        ('notes.jsonl', 2, 'two')
    """
    parsing = parsing or Parsing()
    storage = storage or StorageOptions()
    files = find_files(patterns, options=storage.filesystem, retry=storage.retry)
    first = patterns if isinstance(patterns, str | Path) else next(iter(patterns), "")
    named = name is not None or not has_wildcard(first)
    name = name or source_name(first)
    findings = Findings(name, parsing.on_malformed, parsing.on_unreadable_file)
    format = parsing.format or _format_of(files)
    reader = _open_format(format, text_key, parsing, findings, storage)
    settings: dict[str, str | int | bool] = {"streaming": streaming}
    settings |= {"text_unit": parsing.text_unit} if format == "text" else {"text_key": text_key}
    digests = _check_and_digest(files, reader, findings, storage.retry)
    inputs = InputFiles(files, storage.retry)
    if not streaming:
        fingerprint = Fingerprint.of(reader.kind, digests, settings)
        return FileRecords(name, fingerprint, findings, files, reader, inputs, named=named)
    if shards < 1:
        raise DataError(f"a stream needs at least 1 shard, not {shards}")
    settings["shards"] = shards = min(shards, len(files))
    unit = f"{reader.kind}/{parsing.text_unit}" if format == "text" else reader.kind
    index = None if storage.index_directory is None else IndexDirectory(storage.index_directory)
    fingerprint = Fingerprint.of(reader.kind, digests, settings)
    return FileStream(
        name, fingerprint, findings, files, reader, inputs, shards, RecordCounts(unit, index), named=named
    )


def _format_of(files: Sequence[DataFile]) -> Format:
    """Infer the format from the suffixes; all files must be of one format."""
    found: dict[Format, DataFile] = {}
    for file in files:
        path = file.suffixes
        if compression_of(path):
            path = path.rpartition(".")[0]
        if (format := _FORMATS.get(os.path.splitext(path)[1])) is None:
            raise DataError(
                f'{file.label}: the format cannot be inferred from its name; set format to "jsonl", "parquet" or '
                '"text", or use a pattern that leaves the file out'
            )
        found.setdefault(format, file)
    if len(found) > 1:
        names = ", ".join(f"{file.label} ({format})" for format, file in found.items())
        raise DataError(f"the files are of several formats: {names}; open each format as its own source, or set format")
    return next(iter(found))


def _open_format(
    format: Format, text_key: str, parsing: Parsing, findings: Findings, storage: StorageOptions
) -> FileFormat:
    if format == "jsonl":
        return JsonLines(text_key, findings, storage)
    if format == "parquet":
        return Parquet(text_key, findings, storage)
    if parsing.text_unit == "file":
        return WholeFiles(findings, storage.retry)
    return LineFormat("text", parsing.text_unit, str, findings, storage)


def _check_and_digest(
    files: Sequence[DataFile], reader: FileFormat, findings: Findings, retry: Retry
) -> list[tuple[str, str]]:
    """Check that every file has what is to be read, before the work begins; return the names and digests of all."""
    for file in files:
        require_compression(compression_of(file.suffixes))

    def check(file: DataFile) -> tuple[str, CorruptFileError | None]:
        digest, head = digest_sample(file, retry)
        try:
            if file.size != 0:
                reader.check(file, head)
        except CorruptFileError as error:
            return digest, error
        return digest, None

    with ThreadPoolExecutor(_THREADS) as pool:
        checked = list(pool.map(check, files))
    for file in files:
        file.progress.position = 0  # what was read so far does not count
    found = [(file, error) for file, (_, error) in zip(files, checked, strict=True) if error is not None]
    if found and (findings.stops_at_files or len(found) == sum(file.size != 0 for file in files)):
        raise DataError(_describe_unreadable(found, len(files)))
    for file, error in found:
        findings.report_file(file.label, str(error), error.lost)
    return [(file.name, digest) for file, (digest, _) in zip(files, checked, strict=True)]


def _describe_unreadable(found: Sequence[tuple[DataFile, CorruptFileError]], files: int) -> str:
    lines = [
        f"{file.label}{' ' if isinstance(error, WrongSchemaError) else ': '}{error}" for file, error in found[:_SHOWN]
    ]
    if files == 1:
        return lines[0]
    lines = [f"{line} (lost: {error.lost})" for line, (_, error) in zip(lines, found, strict=False)]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "\n  ".join(
        [f"{len(found)} of {files} files cannot be read: repair them or leave them out:", *lines, *more]
    ) + ('\nTo read the others, set on_unreadable_file to "skip".' if len(found) < files else "")
