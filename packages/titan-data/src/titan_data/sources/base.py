"""Where documents come from: the three source protocols, and Python lists and iterables as sources.

Rules for all three protocols:

- A source returns the same documents in the same order each time it is opened; its fingerprint changes when they
  change. A loader's state refers to documents by number (document i of the source, or of a stream's shard).
- The loader skips and counts documents without text (or tokens). A malformed record that is not an error is therefore
  returned as an empty text: it keeps its number, and repairing the file later does not renumber other documents.
- Reading raises DataError, with file and line, for errors that the user can repair. The loader stays at the step
  before, and the step may be tried again; so a failed read must leave the source usable.
- A loader reads a source from one thread at a time, which may not be the thread that created it.
- Several loaders of a process may read one source object.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.fingerprint import Fingerprint

Tokens = npt.NDArray[Any]
"""One document's ids: a one-dimensional integer array of any dtype."""


@runtime_checkable
class RandomAccessSource(Protocol):
    """Texts that can be read by index in any order; the loader may shuffle them."""

    @property
    def name(self) -> str:
        """The source's name, unique within a mixture; batches list it for each sequence."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Identify the source's contents; called once by each loader."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def __getitem__(self, index: int, /) -> str:
        """The text of document `index`, in `range(len(self))`."""
        ...


@runtime_checkable
class TokenSource(Protocol):
    """Token ids that can be read by index in any order, such as token shards: nothing is tokenized during training.

    The documents are complete: bos and eos, if any, are part of them (as in
    `titan_data.batching.documents.encode_document`); the loader adds nothing.
    """

    @property
    def name(self) -> str:
        """The source's name, unique within a mixture; batches list it for each sequence."""
        ...

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that made the tokens (it must match the loader's); None if unknown."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Identify the source's contents without reading all of them; called once by each loader."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Return the numbers of tokens of several documents.

        Every rank needs those of the complete global batch, about a thousand at a time: this should not read tokens,
        nor loop over the documents in Python.

        Args:
            indices: int64 `[D]`, each in `range(len(self))`, in any order.

        Returns:
            int64 `[D]`.
        """
        ...

    def __getitem__(self, index: int, /) -> Tokens:
        """The tokens of document `index`, preferably a view: the loader often needs only a part, and copies it.

        A `numpy.ndarray` (not a `numpy.memmap`, which is several times slower to slice).
        """
        ...


@runtime_checkable
class StreamSource(Protocol):
    """Texts that can only be read in order; their number is known when they end.

    They are divided among shards, whose number is part of the data's identity (put it into the fingerprint's settings):
    it depends on the files alone, never on ranks or workers. The loader reads one document of each shard in turn,
    skipping shards that have ended; when all have ended, the epoch is over.
    """

    @property
    def name(self) -> str:
        """The source's name, unique within a mixture; batches list it for each sequence."""
        ...

    @property
    def shards(self) -> int:
        """Number of shards, at least 1. The loader keeps one iterator of each open: a few dozen at most."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Identify the source's contents; called once by each loader."""
        ...

    def iterate(self, shard: int, start: int, /) -> Iterator[str]:
        """Read the documents of a shard in order, the same each time.

        The loader closes generators that it does not read to their end.

        Args:
            shard: Number of the shard, in `range(shards)`.
            start: Number of documents to skip at the beginning; may be as large as their total number. A run resumes as
                fast as these are skipped: seek if the format allows it.

        Returns:
            The shard's documents from number `start` to the end of the epoch.
        """
        ...


Source = RandomAccessSource | TokenSource | StreamSource


def identity_of(source: Source, fingerprint: Fingerprint) -> str:
    """Return what the order of a source's documents depends on besides seed and epoch.

    That is its name if somebody has chosen it. A name that was derived from a path is not: the same files in another
    folder are the same source. A source says so with an attribute `named` that is False. Its contents decide then, or
    its attribute `identity` if it has one.

    Args:
        source: The source.
        fingerprint: Its fingerprint.
    """
    if getattr(source, "named", True):
        return source.name
    return getattr(source, "identity", None) or f"{fingerprint.kind}/{fingerprint.digest}"


def check_source(source: object) -> None:
    """Check that an object is a source.

    Args:
        source: The object.

    Raises:
        DataError: If it does not have the members of one of the three protocols.
    """
    if not isinstance(source, RandomAccessSource | TokenSource | StreamSource):
        raise DataError(
            f"a {type(source).__name__} is not a source: it needs name, fingerprint() and either __len__ and "
            "__getitem__, or shards and iterate(shard, start). For a list of strings use ListSource, for any iterable "
            "IterableSource"
        )


class ListSource:
    """Any list of strings as a random-access source.

    Args:
        texts: The documents.
        name: The source's name.
    """

    def __init__(self, texts: Sequence[str], name: str = "list") -> None:
        self._texts = list(texts)
        self.name = name

    def fingerprint(self) -> Fingerprint:
        """Digest every document."""
        return Fingerprint.of("list", ((f"document {i}", _digest(text)) for i, text in enumerate(self._texts)))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int, /) -> str:
        return self._texts[index]


class IterableSource:
    """Any Python iterable as a stream source of one shard.

    On resume it is iterated from its beginning and the documents already used are dropped: for long streams write a
    class with the members of `StreamSource`.

    Args:
        make: Called at the beginning of each epoch and on resume; returns the texts, the same each time.
        name: The source's name.
        version: Change it when the texts change: they cannot be fingerprinted without reading them.
    """

    shards = 1

    def __init__(self, make: Callable[[], Iterable[str]], name: str = "iterable", version: str = "1") -> None:
        self._make = make
        self._version = version
        self.name = name

    def fingerprint(self) -> Fingerprint:
        """Return the version that the user gave."""
        return Fingerprint.of("iterable", [], {"version": self._version})

    def iterate(self, shard: int, start: int, /) -> Iterator[str]:
        """Read the texts from number `start` to the end."""
        return islice(iter(self._make()), start, None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
