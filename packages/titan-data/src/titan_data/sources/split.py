"""`hold_out`: divide a source into the documents to train on and those to validate with, by a hash of each document."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.fingerprint import Fingerprint
from titan_data.sources.base import RandomAccessSource, Source, StreamSource, Tokens, TokenSource, identity_of

_HASHED_TOKENS = 64  # at the beginning of a document of tokens: what all ranks read of every document

S = TypeVar("S", RandomAccessSource, TokenSource, StreamSource)


class Split(NamedTuple):
    """The two sides of a source; in each, the documents of the other are empty, and so are skipped.

    Attributes:
        training: All documents but those that are held out.
        held_out: The documents that are held out.
    """

    training: Source
    held_out: Source


def hold_out(source: Source, share: float) -> Split:
    """Divide a source into documents to train on and documents to validate with.

    A hash of its contents decides the side of a document. So a document stays on its side when others are added,
    removed or reordered, whatever the number of ranks; and copies of it are on the same side: training sees no document
    that is held out. Documents keep their numbers, and training its order.

    Of a document of tokens, the first 64 tokens and the length are hashed, which every rank then reads of all documents
    of a global batch.

    Args:
        source: Any source.
        share: Share of the documents that are held out, larger than 0 and smaller than 1.

    Returns:
        Both sides. The training side has the source's name; that of the other ends in "held out".

    Raises:
        DataError: If the share is out of range.

    Example:
        >>> from titan_data import ListSource
        >>> texts = ["one", "two", "three", "four"]
        >>> training, held_out = hold_out(ListSource(texts), 0.5)
        >>> [training[i] or held_out[i] for i in range(4)] == texts
        True
    """
    if not 0 < share < 1:
        raise DataError(f"the share that is held out must be larger than 0 and smaller than 1, not {share}")
    side: type[_TokenSide | _TextSide | _StreamSide]
    if isinstance(source, TokenSource):
        side = _TokenSide
    elif isinstance(source, RandomAccessSource):
        side = _TextSide
    else:
        side = _StreamSide
    return Split(side(source, share, held_out=False), side(source, share, held_out=True))  # type: ignore[arg-type]


class _Side(Generic[S]):
    """What the sides of all kinds of source have in common."""

    def __init__(self, source: S, share: float, *, held_out: bool) -> None:
        self._source: S = source
        self._share, self._held_out = share, held_out
        self.name = f"{source.name} held out" if held_out else source.name
        self.named = getattr(source, "named", True)  # see `identity_of`

    @property
    def identity(self) -> str:
        """What the order depends on: what that of all documents depends on."""
        return identity_of(self._source, self._source.fingerprint())

    def fingerprint(self) -> Fingerprint:
        """Return the source's fingerprint, with the share and the side."""
        whole = self._source.fingerprint()
        side = {"held_out": self._share, "side": "held out" if self._held_out else "training"}
        own = Fingerprint.of(whole.kind, [("all documents", whole.digest)], {**dict(whole.settings), **side})
        return replace(own, count=whole.count, items=whole.items)

    def _has(self, document: bytes) -> bool:
        number = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big")
        return (number < self._share * (1 << 64)) == self._held_out


class _TextSide(_Side[RandomAccessSource]):
    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> str:
        text = self._source[index]
        return text if self._has(_bytes(text)) else ""


class _StreamSide(_Side[StreamSource]):
    @property
    def shards(self) -> int:
        """Number of shards."""
        return self._source.shards

    def iterate(self, shard: int, start: int, /) -> Iterator[str]:
        """Read the documents of a shard in order."""
        for text in self._source.iterate(shard, start):
            yield text if self._has(_bytes(text)) else ""


class _TokenSide(_Side[TokenSource]):
    def __init__(self, source: TokenSource, share: float, *, held_out: bool) -> None:
        super().__init__(source, share, held_out=held_out)
        self.tokenizer_fingerprint = source.tokenizer_fingerprint

    def __getattr__(self, name: str) -> Any:
        if name in ("vocab_size", "bos_id", "eos_id", "pad_id"):  # what a source of tokens may know besides
            return getattr(self._source, name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self._source)

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Return the numbers of tokens of several documents; 0 for those of the other side."""
        here = np.fromiter(map(self._has_document, indices.tolist()), dtype=np.bool_, count=len(indices))
        return np.where(here, self._source.lengths(indices), np.int64(0))

    def __getitem__(self, index: int, /) -> Tokens:
        document = self._source[index]
        return document if self._has_document(index) else document[:0]

    def _has_document(self, index: int) -> bool:
        document = self._source[index]
        return self._has(np.array([len(document), *document[:_HASHED_TOKENS]], dtype="<i8").tobytes())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")
