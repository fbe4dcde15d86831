"""Where documents come from: the three shapes a source may have, and plain Python lists and iterables as sources.

What holds for all three:

- The same source gives the same documents in the same order each time it is opened; the fingerprint changes when
  they change. A loader keeps its place by numbers (document i of the source, or document i of a stream's shard).
- A document without text (or tokens) is passed over by the loader and counted as skipped. A record that cannot be
  used (malformed, and the source is told to go on) is therefore given as the empty text: so its number stays taken,
  and mending the file later moves no other document.
- Reading raises DataError with file and line where a person can mend it. The loader stays at the step before, and the
  same step may be tried again; so a source must not be spoilt by a failed read.
- A loader reads a source from one thread at a time, which may be another one than the thread that made it.
- One source object may be read by several loaders of a process.
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
    """Texts that can be read one by one in any order; the loader may shuffle them."""

    @property
    def name(self) -> str:
        """What people call this source; each row of a batch carries it. Unique within a mixture."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Say what the source is made of; asked for once by each loader."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def __getitem__(self, index: int, /) -> str:
        """Document number `index`, in `range(len(self))`."""
        ...


@runtime_checkable
class TokenSource(Protocol):
    """Ready-made tokens that can be read in any order, such as token shards: nothing is tokenized while training.

    The documents are complete: where there is to be a bos before and an eos after each, they are in it (as
    `titan_data.batching.documents.encode_document` puts them); the loader adds nothing.
    """

    @property
    def name(self) -> str:
        """What people call this source; each row of a batch carries it. Unique within a mixture."""
        ...

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that made the tokens (refused if the loader's differs); None if not known."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Say what the source is made of, without reading all of it; asked for once by each loader."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Numbers of tokens of some documents.

        Every rank asks for those of the whole global batch, some thousand at a time: so without reading tokens, and
        without a Python loop over the documents.

        Args:
            indices: int64 `[D]`, each in `range(len(self))`, in any order.

        Returns:
            int64 `[D]`.
        """
        ...

    def __getitem__(self, index: int, /) -> Tokens:
        """Tokens of document number `index`, best as a view: the loader often needs but a part of them, and copies it.

        A plain `numpy.ndarray` (not a `numpy.memmap`, which is several times slower to slice).
        """
        ...


@runtime_checkable
class StreamSource(Protocol):
    """Texts that come only in their own order; how many there are shows when they end.

    They are divided among a number of shards that is part of the data's identity (put it into the fingerprint's
    settings): it depends on the files alone, never on ranks or workers. The loader takes one document of each shard
    in turn, passing over shards that have ended; when all have, the epoch is over.
    """

    @property
    def name(self) -> str:
        """What people call this source; each row of a batch carries it. Unique within a mixture."""
        ...

    @property
    def shards(self) -> int:
        """Number of shards, at least 1. The loader keeps one iterator of each open, so some dozens at most."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Say what the source is made of; asked for once by each loader."""
        ...

    def iterate(self, shard: int, start: int, /) -> Iterator[str]:
        """Read the documents of a shard in order, the same ones each time.

        The loader closes generators that it leaves before their end.

        Args:
            shard: which one, in `range(shards)`.
            start: number of documents to leave out at the beginning; may be as large as the number there are. How
                fast these are passed is how fast a run resumes: go there directly where the format allows it.

        Returns:
            The shard's documents from number `start` to the end of the epoch.
        """
        ...


Source = RandomAccessSource | TokenSource | StreamSource


def check_source(source: object) -> None:
    """Make sure that something is a source.

    Args:
        source: what somebody gave as one.

    Raises:
        DataError: it has the members of none of the three shapes.
    """
    if not isinstance(source, RandomAccessSource | TokenSource | StreamSource):
        raise DataError(
            f"a {type(source).__name__} is no source: it needs name, fingerprint() and either __len__ and "
            "__getitem__, or shards and iterate(shard, start). For a list of strings use ListSource, for any iterable "
            "IterableSource"
        )


class ListSource:
    """Any list of strings as a random-access source.

    Args:
        texts: the documents.
        name: what to call the source.
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
    """Anything that Python can iterate over as a stream source of one shard.

    On resume it is iterated from its beginning and the documents already used are dropped: for long streams write a
    class with the members of `StreamSource`.

    Args:
        make: called at the begin of each epoch and on resume; gives the texts, the same ones each time.
        name: what to call the source.
        version: change it when the texts change: what is in an iterable cannot be told without reading it.
    """

    shards = 1

    def __init__(self, make: Callable[[], Iterable[str]], name: str = "iterable", version: str = "1") -> None:
        self._make = make
        self._version = version
        self.name = name

    def fingerprint(self) -> Fingerprint:
        """Name the version that the user gave."""
        return Fingerprint.of("iterable", [], {"version": self._version})

    def iterate(self, shard: int, start: int, /) -> Iterator[str]:
        """Read the texts from number `start` to the end."""
        return islice(iter(self._make()), start, None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
