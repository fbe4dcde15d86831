"""The order of a random-access source's documents in each epoch. Called by the feeds."""

import numpy as np
import numpy.typing as npt

from titan_data.batching.documents import Cursor
from titan_data.batching.permutation import Permutation
from titan_data.errors import DataError


class EpochOrder:
    """The order of `count` documents in each epoch, shuffled or not. A cursor is `(epoch, index in the epoch)`.

    Args:
        name: The source's name, for messages.
        identity: With seed and epoch it is the key of the shuffle.
        count: Number of documents.
        seed: Seed of the shuffle.
        shuffle: Whether each epoch has an order of its own; otherwise documents come as they are numbered.

    Raises:
        DataError: If there are no documents.
    """

    start: Cursor = (0, 0)

    def __init__(self, name: str, identity: str, count: int, *, seed: int, shuffle: bool) -> None:
        if count == 0:
            raise DataError(f"source {name!r} has no documents")
        self.name = name
        self.identity = identity
        self.count = count
        self._seed = seed
        self._shuffle = shuffle
        self._permutation: tuple[int, Permutation] | None = None  # (epoch, its order): made once per epoch

    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Validate a saved cursor; see `Feed.check`."""
        if len(cursor) != 2 or not (lenient or 0 <= cursor[1] < self.count):
            raise DataError(f"source {self.name!r} has {self.count} documents, but the saved cursor is {list(cursor)}")
        return self.cursor(*cursor)

    def cursor(self, epoch: int, index: int) -> Cursor:
        """Make a cursor; the end of an epoch is the start of the next."""
        return (epoch, index) if index < self.count else (epoch + 1, 0)

    def documents(self, epoch: int, index: int, count: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the next `count` documents from an index on, at most to the end of the epoch."""
        stop = min(index + count, self.count)
        if not self._shuffle:
            return np.arange(index, stop)
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self.count, key=f"{self._seed}/{self.identity}/{epoch}"))
        return self._permutation[1].entries(index, stop)
