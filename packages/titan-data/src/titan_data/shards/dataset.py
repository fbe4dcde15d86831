"""`TokenShards`: token shards as a source, memory-mapped. Opening takes the same time for any size."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.fingerprint import Fingerprint
from titan_data.shards.folder import ShardFolder
from titan_data.shards.format import Job
from titan_data.sources.base import Tokens

# Each open shard holds a file descriptor; a process often has no more than 1,024 (256 on macOS). Opening a shard again
# takes about 15 microseconds.
_OPEN_SHARDS = 128
_KIND = "token shards"


class TokenShards:
    """The documents of a folder written by `titan-data prepare`, or of several folders, as a `TokenSource`.

    Opening reads the manifest and the sizes of the files; a shard is mapped when one of its documents is first read.

    Args:
        path: The folder; or several folders made with one tokenizer, whose documents follow one another.
        name: The source's name; the folder's name if None. A name that is given is part of the source's identity: it
            decides the order. Without one, what the folder was prepared from decides it, whatever the folder is called
            and in however many parts it was prepared.
        verify: Check the checksum of each shard when one of its documents is first read, and that of the offsets when
            opening, at the cost of reading all of it once more. Without, sizes and headers are checked, and a token
            that has changed on the disk is not noticed: run `titan-data verify` after copying.

    Attributes:
        name: The source's name.
        tokenizer_fingerprint: Fingerprint of the tokenizer that made the tokens.
        vocab_size: The tokenizer's vocabulary size; every id is below it.
        bos_id: The first token of each document, or None.
        eos_id: The last token of each document, or None.
        pad_id: The tokenizer's padding id, or None.
        tokens: Number of tokens in all documents.

    Raises:
        DataError: If a folder contains no finished token shards, files of it are missing, truncated or corrupt, or the
            folders were made with several tokenizers.
    """

    def __init__(
        self, path: str | Path | Sequence[str | Path], *, name: str | None = None, verify: bool = False
    ) -> None:
        self.paths = [Path(one).expanduser() for one in ([path] if isinstance(path, str | Path) else path)]
        if not self.paths:
            raise DataError("no folder of token shards was given")
        self.name = name if name is not None else "+".join(path.absolute().name for path in self.paths)
        self.named = name is not None  # see `identity_of`
        self._verify = verify
        open_shards = max(1, _OPEN_SHARDS // len(self.paths))
        self._folders = [ShardFolder(path, verify=verify, open_shards=open_shards) for path in self.paths]
        self._check_tokenizers()
        job = self._folders[0].manifest.job
        self.tokenizer_fingerprint: str | None = job.tokenizer
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = job.vocab_size, job.bos_id, job.eos_id, job.pad_id
        self.tokens = sum(folder.manifest.tokens for folder in self._folders)
        self._first_documents = [0, *accumulate(folder.manifest.documents for folder in self._folders)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.paths, self.name if self.named else None, self._verify)

    @property
    def identity(self) -> str:
        """What the order depends on if nobody has chosen a name: all that the documents were made from."""
        jobs = [_made_from(folder.manifest.job) for folder in self._folders]
        return f"{_KIND}/{hashlib.sha256(json.dumps(jobs, sort_keys=True).encode()).hexdigest()[:32]}"

    def fingerprint(self) -> Fingerprint:
        """Return the shards' names and checksums from the manifests."""
        return Fingerprint.of(_KIND, self._items(), {"tokenizer": self.tokenizer_fingerprint})

    def _items(self) -> Iterator[tuple[str, str]]:
        for number, folder in enumerate(self._folders):
            prefix = f"folder {number}, " if len(self._folders) > 1 else ""
            for shard in folder.manifest.shards:
                yield prefix + shard.name, shard.sha256[:16]

    def __len__(self) -> int:
        return self._first_documents[-1]

    def lengths(self, indices: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]:
        """Return the numbers of tokens of several documents: int64 `[D]` for int64 `[D]`."""
        if len(self._folders) == 1:
            return self._folders[0].lengths(indices)
        lengths = np.empty(len(indices), dtype=np.int64)
        numbers = np.searchsorted(self._first_documents, indices, side="right") - 1
        for number in np.unique(numbers):
            here = numbers == number
            lengths[here] = self._folders[number].lengths(indices[here] - self._first_documents[number])
        return lengths

    def __getitem__(self, index: int, /) -> Tokens:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = 0 if len(self._folders) == 1 else bisect_right(self._first_documents, index) - 1
        return self._folders[number].document(index - self._first_documents[number])

    def _check_tokenizers(self) -> None:
        first = self._folders[0].manifest.job
        for folder in self._folders[1:]:
            job = folder.manifest.job
            for key in ("tokenizer", "vocab_size", "bos_id", "eos_id"):
                if (was := getattr(first, key)) != (now := getattr(job, key)):
                    raise DataError(
                        f"{self.paths[0]} and {folder.path} were made with different tokenizers: {key} is {was!r} and "
                        f"{now!r}; open them as two sources of one vocabulary, or prepare one of them again"
                    )


def _made_from(job: Job) -> dict[str, Any]:
    """Return what the documents were made from; not how they were divided."""
    fields = job.to_json()
    return {
        "source": job.source.digest,
        "part": fields.get("part"),
        **{key: fields[key] for key in ("tokenizer", "vocab_size", "bos_id", "eos_id")},
    }


def _reopen(paths: list[Path], name: str | None, verify: bool) -> TokenShards:  # noqa: FBT001  # as pickle calls it
    return TokenShards(paths, name=name, verify=verify)
