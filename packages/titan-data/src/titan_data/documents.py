"""The order in which documents are handed out: one endless queue over the epochs of a source."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from titan_data.errors import DataError
from titan_data.permutation import Permutation
from titan_data.sources import RandomAccessSource, Source, StreamSource


class DocumentNumber(NamedTuple):
    """A document's place in the queue: `place` counts from 0 within each epoch, in the order of that epoch."""

    epoch: int
    place: int


class DocumentQueue(Protocol):
    """Hands out the documents of epoch 0, then those of epoch 1, and so on without end."""

    @property
    def position(self) -> DocumentNumber:
        """Where the next document is looked for."""
        ...

    def take(self) -> tuple[DocumentNumber, str]:
        """Hand out the next document."""
        ...

    def seek(self, position: DocumentNumber) -> None:
        """Go to a position that the queue once had."""
        ...

    def read(self, numbers: Iterable[DocumentNumber]) -> dict[DocumentNumber, str]:
        """Read documents again that were handed out before, without moving the queue."""
        ...


def open_queue(source: Source, *, seed: int, shuffle: bool) -> DocumentQueue:
    """Make the queue that suits a source.

    Args:
        source: where the documents come from.
        seed: together with the epoch, decides the order where documents are shuffled.
        shuffle: whether to shuffle; of no effect on a stream, which has only its own order.

    Returns:
        The queue, at its beginning.

    Raises:
        DataError: the source is of neither shape or has no documents.
    """
    if isinstance(source, RandomAccessSource):
        return RandomAccessQueue(source, seed=seed, shuffle=shuffle)
    if isinstance(source, StreamSource):
        return StreamQueue(source)
    raise DataError(
        f"a {type(source).__name__} is no source: it needs name, fingerprint and either __len__ with __getitem__ or "
        "iterate(start); for a list of strings, use ListSource"
    )


class RandomAccessQueue:
    """The queue over documents that can be read in any order: moving and reading cost nothing that grows."""

    def __init__(self, source: RandomAccessSource, *, seed: int, shuffle: bool) -> None:
        if len(source) == 0:
            raise DataError(f"source {source.name!r} has no documents")
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        self.position = DocumentNumber(0, 0)
        self._order: tuple[int, Permutation] | None = None  # (epoch, its order): made once per epoch

    def take(self) -> tuple[DocumentNumber, str]:
        """Hand out the next document."""
        number = self.position
        text = self._text(number)
        self.position = DocumentNumber(number.epoch, number.place + 1)
        if self.position.place == len(self._source):
            self.position = DocumentNumber(number.epoch + 1, 0)
        return number, text

    def seek(self, position: DocumentNumber) -> None:
        """Go to a position that the queue once had."""
        self._check(position)
        self.position = position

    def read(self, numbers: Iterable[DocumentNumber]) -> dict[DocumentNumber, str]:
        """Read documents again, without moving the queue."""
        return {number: self._text(number) for number in numbers}

    def _text(self, number: DocumentNumber) -> str:
        self._check(number)
        if not self._shuffle:
            return self._source[number.place]
        if self._order is None or self._order[0] != number.epoch:
            self._order = (number.epoch, Permutation(len(self._source), key=f"{self._seed}/{number.epoch}"))
        return self._source[self._order[1][number.place]]

    def _check(self, number: DocumentNumber) -> None:
        if number.epoch < 0 or not 0 <= number.place < len(self._source):
            raise DataError(f"source {self._source.name!r} has {len(self._source)} documents, so there is no {number}")


class StreamQueue:
    """The queue over documents that come only in order: going back means reading from the start of the epoch."""

    def __init__(self, source: StreamSource) -> None:
        self._source = source
        # The end of an epoch shows only when the stream ends, so the place may equal the number of documents.
        self.position = DocumentNumber(0, 0)
        self._iterator: Iterator[str] | None = None

    def take(self) -> tuple[DocumentNumber, str]:
        """Hand out the next document."""
        while True:
            if self._iterator is None:
                self._iterator = iter(self._source.iterate(self.position.place))
            number = self.position
            text = next(self._iterator, None)
            if text is not None:
                self.position = DocumentNumber(number.epoch, number.place + 1)
                return number, text
            if number.place == 0:
                raise DataError(f"source {self._source.name!r} has no documents")
            self.seek(DocumentNumber(number.epoch + 1, 0))

    def seek(self, position: DocumentNumber) -> None:
        """Go to a position that the queue once had."""
        self.position = position
        # Always a fresh iterator: a generator that has raised looks like one that has come to its end.
        self._iterator = None

    def read(self, numbers: Iterable[DocumentNumber]) -> dict[DocumentNumber, str]:
        """Read documents again in one pass per epoch, without moving the queue."""
        wanted = set(numbers)
        texts: dict[DocumentNumber, str] = {}
        for epoch in {number.epoch for number in wanted}:
            places = [number.place for number in wanted if number.epoch == epoch]
            first, last = min(places), max(places)
            # The range comes first in the zip, so that nothing is read beyond the last document wanted.
            for place, text in zip(range(first, last + 1), self._source.iterate(first), strict=False):
                if (number := DocumentNumber(epoch, place)) in wanted:
                    texts[number] = text
        if missing := wanted - texts.keys():
            raise DataError(f"source {self._source.name!r} ends before {min(missing)}: its documents have changed")
        return texts
