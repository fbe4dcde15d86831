"""`prepare`: tokenize a source into token shards in parallel; interrupted runs resume."""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from titan_data.batching.checks import as_int
from titan_data.errors import DataError
from titan_data.files.inputs import HasBytesRead
from titan_data.shards.batches import Batch, read_batches
from titan_data.shards.begin import begin_or_resume, check_same_job, dump_record, locked, read_record
from titan_data.shards.format import (
    INPUTS,
    MANIFEST,
    UNFINISHED,
    Header,
    Job,
    Manifest,
    read_manifest,
    token_dtype,
)
from titan_data.shards.inputs import check_unchanged
from titan_data.shards.parts import Part, Span, check_room_for, span_of
from titan_data.shards.workers import Encoded, Encoders
from titan_data.shards.writer import ShardWriter, explain_full_disk, write_atomically, write_manifest
from titan_data.sources.base import RandomAccessSource, Source, StreamSource
from titan_data.tokenizers.base import Tokenizer

SHARD_TOKENS = 1 << 28  # half a GiB of 16-bit ids, one GiB of 32-bit ones


@dataclass(frozen=True)
class Progress:
    """The progress of `prepare`.

    Attributes:
        done: Documents of a random-access source that are finished, bytes of files that are read as a stream, or
            finished shards of another stream.
        total: Total number of these.
        documents: Documents tokenized, including those of interrupted runs.
        tokens: Tokens in these documents.
        new_tokens: Tokens of this run.
        shards: Finished shards.
    """

    done: int
    total: int
    documents: int
    tokens: int
    new_tokens: int
    shards: int


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    part: Part | None = None,
    checksum: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenize a source into a folder of token shards.

    Documents keep their order and numbers (a document without text becomes one without tokens); the shards of a stream
    follow one another. The files depend on source, tokenizer and `shard_tokens` alone. To resume after any
    interruption, repeat the call: finished shards are kept.

    Many machines can prepare one corpus: each calls this with a part of its own, of the same source, and `merge_shards`
    joins the parts. The number of parts may be any: it decides where shards begin, and changes nothing in the order of
    the documents, nor in the batches of a loader.

    With workers, a script must call this under `if __name__ == "__main__":`, as always with Python's multiprocessing.

    Args:
        source: A source of text.
        tokenizer: Turns texts into ids.
        path: Folder for the shards; created if missing.
        workers: Processes that tokenize; None for one per core, 0 to tokenize in this process.
        shard_tokens: Maximum number of tokens of a shard, unless a single document has more.
        part: The part of the source to prepare, into a folder of its own in `path`; None for all of it. A stream is
            divided between its shards.
        checksum: Read all input files once more at the beginning and record their checksums, so that a resume tells
            files that were only copied from edited ones; and compare them when it resumes. Without, sizes and times of
            modification (or ETags) must be the same.
        report: Called with the progress after each batch.

    Returns:
        The manifest of the folder, or of the part's folder; it may have been finished before.

    Raises:
        DataError: If the source cannot be read, has no documents or consists of tokens; the folder contains something
            else, or parts of another number; an input file was edited since the work began; or the disk is full.

    Example:
        >>> import tempfile
        >>> from titan_data import ByteTokenizer, ListSource, TokenShards
        >>> path = tempfile.mkdtemp()
        >>> manifest = prepare(ListSource(["one", "two"]), ByteTokenizer(), path, workers=0)
        >>> manifest.documents, manifest.tokens
        (2, 10)
        >>> TokenShards(path)[0].tolist()
        [256, 111, 110, 101, 257]
    """
    if not isinstance(source, RandomAccessSource | StreamSource) or hasattr(source, "lengths"):
        raise DataError(f"source {source.name!r} contains no text: there is nothing to prepare")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens must be at least 1, not {shard_tokens}")
    folder = Path(path).expanduser()
    job = _job_of(source, tokenizer, shard_tokens, part)
    with explain_full_disk(folder):
        check_room_for(part, folder)
        folder = folder if part is None else folder / part.folder_name
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / MANIFEST).exists():
            return _check_finished(folder, job, source, checksum=checksum)
        headers, inputs = begin_or_resume(folder, job, source, checksum=checksum)
        shards = _Shards(folder, job, headers, span_of(source, part))
        with Encoders(tokenizer, token_dtype(job.vocab_size), _cores() if workers is None else workers) as encoders:
            _write_shards(source, encoders, shards, report)
        if not headers and part is None:
            (folder / UNFINISHED).unlink()
            raise DataError(f"source {source.name!r} has no documents")
        check_unchanged(source)
        if inputs is not None:
            write_atomically(folder / INPUTS, dump_record({"inputs": inputs.to_json()}))
        manifest = write_manifest(folder, job, [header.entry(number) for number, header in enumerate(headers)])
        (folder / UNFINISHED).unlink(missing_ok=True)
        return manifest


def _job_of(source: Source, tokenizer: Tokenizer, shard_tokens: int, part: Part | None) -> Job:
    return Job(
        source=source.fingerprint(),
        tokenizer=tokenizer.fingerprint,
        vocab_size=as_int("vocab_size", tokenizer.vocab_size),
        bos_id=_id("bos_id", tokenizer.bos_id),
        eos_id=_id("eos_id", tokenizer.eos_id),
        pad_id=_id("pad_id", tokenizer.pad_id),
        shard_tokens=as_int("shard_tokens", shard_tokens),
        part=None if part is None else (part.index, part.count),
    )


def _check_finished(folder: Path, job: Job, source: Source, *, checksum: bool) -> Manifest:
    """Return the manifest of a finished folder, after checking that it was made by this job from these files."""
    manifest = read_manifest(folder)
    check_same_job(manifest.job, job, folder)
    recorded = read_record(folder / INPUTS)[0] if (folder / INPUTS).exists() else None
    if recorded is not None:
        recorded.check(source, folder, checksum=checksum)
    return manifest


def _write_shards(
    source: RandomAccessSource | StreamSource,
    encoders: Encoders,
    shards: "_Shards",
    report: Callable[[Progress], None] | None,
) -> None:
    """Tokenize the rest of the source and append it to the shards, in the order of the source."""
    kept_tokens = shards.tokens
    start, stop = shards.span

    def report_progress(*, ended: bool = False) -> None:
        if report is None:
            return
        if isinstance(source, RandomAccessSource):
            done, total = shards.documents, stop[1] - start[1]
        elif isinstance(source, HasBytesRead) and source.bytes_total is not None:
            before = source.bytes_before(start[0])
            total = source.bytes_before(stop[0]) - before
            done = total if ended else source.bytes_read(shards.source_end[0]) - before
        else:
            done, total = shards.source_end[0] - start[0], stop[0] - start[0]
        new_tokens = shards.tokens - kept_tokens
        report(Progress(done, total, shards.documents, shards.tokens, new_tokens, shards.finished))

    report_progress()
    in_work: deque[Batch] = deque()
    next_document = start[1] + shards.documents
    try:
        for batch in read_batches(source, Span(shards.source_end, stop)):
            while encoders.full:
                shards.write(in_work.popleft(), encoders.take())
                report_progress()
            encoders.put(batch.texts, next_document)
            in_work.append(batch._replace(texts=[]))
            next_document += len(batch.texts)
        while in_work:
            shards.write(in_work.popleft(), encoders.take())
            report_progress()
        shards.close()
        report_progress(ended=True)
    except BaseException:
        shards.discard()
        raise


class _Shards:
    """The shards of a folder, written to like one file; `headers` are those of the finished ones, and grow.

    `span` is what is to be read of the source, and `source_end` how far the shards have got.
    """

    def __init__(self, folder: Path, job: Job, headers: list[Header], span: Span) -> None:
        self._folder, self._job, self._headers = folder, job, headers
        self.documents = sum(header.documents for header in headers)
        self.tokens = sum(header.tokens for header in headers)
        self._writer: ShardWriter | None = None
        self.span = span
        self.source_end = headers[-1].source_end if headers else span.start

    @property
    def finished(self) -> int:
        """Number of finished shards."""
        return len(self._headers)

    def write(self, batch: Batch, encoded: Encoded) -> None:
        """Append a batch, and publish the shards that it fills."""
        tokens, lengths, start = encoded.tokens, encoded.lengths, batch.source_start
        while len(lengths):
            if self._writer is None:
                self._writer = ShardWriter(self._folder, len(self._headers), self.documents, self._job)
            count = self._writer.room_for(lengths)
            size = int(lengths[:count].sum())
            if count:
                self._writer.append(tokens[:size], lengths[:count])
                self.documents += count
                self.tokens += size
                start += count
                self.source_end = (batch.source_shard, start)
                tokens, lengths = tokens[size:], lengths[count:]
            else:
                self.close()

    def close(self) -> None:
        """Publish the unfinished shard, if there is one."""
        if self._writer is not None:
            self._headers.append(self._writer.publish(self.source_end))
            self._writer = None

    def discard(self) -> None:
        """Delete the unfinished shard, if there is one."""
        if self._writer is not None:
            self._writer.discard()


def _id(name: str, value: int | None) -> int | None:
    return None if value is None else as_int(name, value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
