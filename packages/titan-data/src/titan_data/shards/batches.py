"""Reading consecutive documents of a source in batches, which the workers of `prepare` tokenize."""

from collections.abc import Iterator
from typing import NamedTuple

from titan_data.shards.parts import Span
from titan_data.sources.base import RandomAccessSource, StreamSource

_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 4096


class Batch(NamedTuple):
    """Consecutive documents of one shard of a source.

    Attributes:
        texts: The documents.
        source_shard: The shard; 0 for a source without shards.
        source_start: Number of the first document in that shard.
    """

    texts: list[str]
    source_shard: int
    source_start: int


def read_batches(source: RandomAccessSource | StreamSource, span: Span) -> Iterator[Batch]:
    """Read the documents of a span in batches; a batch of a stream is of one shard."""
    (shard, document), (stop_shard, stop_document) = span
    if isinstance(source, RandomAccessSource):
        yield from _cut((source[i] for i in range(document, stop_document)), shard, document)
        return
    while shard < stop_shard:
        yield from _cut(source.iterate(shard, document), shard, document)
        shard, document = shard + 1, 0


def _cut(texts: Iterator[str], shard: int, start: int) -> Iterator[Batch]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield Batch(batch, shard, start)
            start += len(batch)
            batch, characters = [], 0
    if batch:
        yield Batch(batch, shard, start)
