"""Where documents come from: the two shapes a source may have, and a list of strings as a source."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class RandomAccessSource(Protocol):
    """Documents that can be read one by one in any order; the loader may shuffle them."""

    @property
    def name(self) -> str:
        """What people call this source; each row of a batch carries it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the documents or their order change; a saved state is refused when it differs."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def __getitem__(self, index: int, /) -> str:
        """Document number `index`, in `range(len(self))`."""
        ...


@runtime_checkable
class StreamSource(Protocol):
    """Documents that come only in their own order; how many there are shows when they end."""

    @property
    def name(self) -> str:
        """What people call this source; each row of a batch carries it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the documents or their order change; a saved state is refused when it differs."""
        ...

    def iterate(self, start: int) -> Iterator[str]:
        """Read the documents in order, the same ones each time.

        Args:
            start: number of documents to leave out at the beginning; may be as large as the number there are.

        Returns:
            The documents from number `start` to the end of the epoch.
        """
        ...


Source = RandomAccessSource | StreamSource


class ListSource:
    """Any list of strings as a random-access source.

    Args:
        texts: the documents.
        name: what to call the source.
    """

    def __init__(self, texts: Sequence[str], name: str = "list") -> None:
        self._texts = list(texts)
        self.name = name
        digest = hashlib.sha256()
        for text in self._texts:
            data = text.encode("utf-8", errors="surrogatepass")
            # The length goes in too: otherwise ["ab"] and ["a", "b"] would have one fingerprint.
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int, /) -> str:
        return self._texts[index]
