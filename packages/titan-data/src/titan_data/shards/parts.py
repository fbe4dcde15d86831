"""Parts of a corpus, prepared one by one, on one machine or many: which documents belong to each, and its folder.

Called by `prepare`, which writes a part, and by `merge_shards`, which joins them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titan_data.errors import DataError
from titan_data.files.inputs import HasBytesRead
from titan_data.shards.format import MANIFEST, UNFINISHED, read_manifest
from titan_data.sources.base import RandomAccessSource, StreamSource

_FOLDER = re.compile(r"part-(\d{5,})-of-(\d{5,})")


@dataclass(frozen=True, order=True)
class Part:
    """Part `index` of `count` of a corpus. The parts follow one another: together they are its documents in order.

    Attributes:
        index: Number of the part, from 0.
        count: Number of parts.

    Raises:
        DataError: If there is no such part.

    Example:
        >>> Part(3, 16).folder_name
        'part-00003-of-00016'
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise DataError(f"there is no part {self.index} of {self.count}: the parts are numbered from 0")

    @property
    def folder_name(self) -> str:
        """Name of its folder inside of the folder of the corpus."""
        return f"part-{self.index:05d}-of-{self.count:05d}"


def parts_in(folder: Path) -> list[Part]:
    """Find the parts that a folder contains, finished or not, in order."""
    if not folder.is_dir():
        return []
    names = [_FOLDER.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir()]
    return sorted(Part(int(name[1]), int(name[2])) for name in names if name is not None)


def check_room_for(part: Part | None, folder: Path) -> None:
    """Check that a folder is free for a corpus that is prepared in these parts.

    Args:
        part: What is to be prepared in it; None for all of it at once.
        folder: The folder of the corpus.

    Raises:
        DataError: If it contains parts of another number, or a corpus that was prepared in another way.
    """
    counts = {found.count for found in parts_in(folder)}
    if part is None:
        if counts:
            raise DataError(
                f"{folder} contains parts of a corpus: prepare all of them and join them with `titan-data merge "
                f"{folder}`, or choose another folder"
            )
        return
    if counts - {part.count}:
        raise DataError(
            f"{folder} contains parts of {min(counts - {part.count})}, not of {part.count}: prepare the others with "
            "the same number of parts, or choose another folder"
        )
    if (folder / UNFINISHED).exists() or (
        (folder / MANIFEST).exists() and any("/" not in shard.name for shard in read_manifest(folder).shards)
    ):
        raise DataError(f"{folder} contains a corpus that was not prepared in parts: choose another folder")


class Span(NamedTuple):
    """Consecutive documents of a source, from `start` up to `stop`: `(shard, document)`.

    The shard is 0 for a source without shards. A span of a stream stops at the beginning of a shard.
    """

    start: tuple[int, int]
    stop: tuple[int, int]


def span_of(source: RandomAccessSource | StreamSource, part: Part | None) -> Span:
    """Return the documents of a part.

    A source that is read by index is divided by its number of documents. A stream is divided between its shards, which
    are its files if it was opened with one shard per file, by their bytes if they are known; so a part may be empty.

    Args:
        source: The source.
        part: The part; None for all documents.
    """
    part = part or Part(0, 1)
    if isinstance(source, RandomAccessSource):
        first, last = (len(source) * index // part.count for index in (part.index, part.index + 1))
        return Span((0, first), (0, last))
    beginnings = _beginnings(source)
    first, last = (_shard_at(beginnings, index, part.count) for index in (part.index, part.index + 1))
    return Span((first, 0), (last, 0))


def _beginnings(source: StreamSource) -> list[int]:
    """Return where each shard begins, and where the last one ends: in bytes, or in shards if bytes are not known."""
    if isinstance(source, HasBytesRead) and source.bytes_total:
        return [source.bytes_before(shard) for shard in range(source.shards + 1)]
    return list(range(source.shards + 1))


def _shard_at(beginnings: list[int], index: int, count: int) -> int:
    """Return the first shard of part `index` of `count`: the one that begins nearest to that share of the whole."""
    shards, total = len(beginnings) - 1, beginnings[-1]
    if index == count:
        return shards
    return min(range(shards), key=lambda shard: (abs(beginnings[shard] * count - total * index), shard))
