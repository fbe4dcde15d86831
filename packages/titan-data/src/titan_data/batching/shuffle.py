"""Which document comes at each place of a queue that may be shuffled."""

import numpy as np
import numpy.typing as npt

from titan_data.batching.documents import Cursor
from titan_data.batching.permutation import Permutation
from titan_data.errors import DataError


class Order:
    """Which document comes at each place of each epoch. Its cursors are `(epoch, place)`."""

    start: Cursor = (0, 0)

    def __init__(self, name: str, count: int, *, seed: int, shuffle: bool) -> None:
        if count == 0:
            raise DataError(f"source {name!r} has no documents")
        self.name = name
        self.count = count
        self._seed = seed
        self._shuffle = shuffle
        self._permutation: tuple[int, Permutation] | None = None  # (epoch, its order): made once per epoch

    def check(self, cursor: Cursor, *, lenient: bool = False) -> Cursor:
        """Return the place if there is one, as `Feed.check` says."""
        if len(cursor) != 2 or not (lenient or 0 <= cursor[1] < self.count):
            raise DataError(f"source {self.name!r} has {self.count} documents, so there is no place {list(cursor)}")
        return self.cursor(*cursor)

    def cursor(self, epoch: int, place: int) -> Cursor:
        """Make a cursor; after the last document of an epoch comes the first of the next."""
        return (epoch, place) if place < self.count else (epoch + 1, 0)

    def indices(self, epoch: int, place: int, count: int) -> npt.NDArray[np.int64]:
        """Give the numbers of the documents from a place on: `count` of them, or to the end of the epoch."""
        stop = min(place + count, self.count)
        if not self._shuffle:
            return np.arange(place, stop)
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self.count, key=f"{self._seed}/{self.name}/{epoch}"))
        return self._permutation[1].entries(place, stop)
