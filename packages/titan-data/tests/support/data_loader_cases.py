"""Sources, digests and stopped-and-resumed runs that several of the loader's tests share."""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from data_flat import flat_loader
from titan_data import ByteTokenizer, Fingerprint, ListSource, Loader

WORLD_SIZES = (1, 2, 3, 4, 6, 8)
GLOBAL_BATCH_SIZE = 24  # divides among all of them
KEYS = ("tokens", "labels", "positions", "document_ids")


class ListTokens:
    """Lists of ids as a source of tokens. Counts how many documents are read and how many lengths are looked up."""

    def __init__(
        self, documents: Any, name: str = "tokens", tokenizer_fingerprint: str | None = None, dtype: Any = np.uint16
    ) -> None:
        self._documents = [np.array(document, dtype=dtype) for document in documents]
        self._lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self.name = name
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.read = set()
        self.looked_up = 0

    def fingerprint(self) -> Fingerprint:
        items = ((f"document {i}", str(document.tolist())) for i, document in enumerate(self._documents))
        return Fingerprint.of("tokens", items)

    def __len__(self) -> int:
        return len(self._documents)

    def lengths(self, indices: Any) -> Any:
        self.looked_up += len(indices)
        return self._lengths[indices]

    def __getitem__(self, index: int) -> Any:
        self.read.add(index)
        return self._documents[index]


class ListStream:
    """Lists of strings, one per shard, that can only be read in order."""

    def __init__(self, shards: list[list[str]], name: str = "stream") -> None:
        self._shards = shards
        self.name = name
        self.shards = len(shards)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of("stream", ((f"shard {i}", str(texts)) for i, texts in enumerate(self._shards)))

    def iterate(self, shard: int, start: int) -> Iterator[str]:
        yield from islice(self._shards[shard], start, None)


def numbered(lengths: list[int]) -> list[range]:
    """Documents whose tokens are all different: 1, 2, 3, … through them all. (0 is what pads.)"""
    documents, at = [], 1
    for length in lengths:
        documents.append(range(at, at + length))
        at += length
    return documents


def encoded(texts: list[str]) -> list[list[int]]:
    """What ByteTokenizer's documents are."""
    return [[256, *text.encode(), 257] if text else [] for text in texts]


def make_source(kind: str, texts: list[str]) -> Any:
    """The same texts as a source of one of the kinds."""
    if kind == "texts":
        return ListSource(texts, name="source")
    if kind == "tokens":
        return ListTokens(encoded(texts), name="source")
    return ListStream([texts[i::3] for i in range(3)], name="source")


def open_loader(source: Any, **changes: Any) -> Loader:
    return flat_loader(source, ByteTokenizer(), **{"seq_len": 16, "global_batch_size": 8, "prefetch": 0, **changes})


def digest(batches: list[Any]) -> str:
    """SHA-256 of a global batch, given the ranks' (or microbatches') sequences in order."""
    sha = hashlib.sha256()
    for key in KEYS:
        whole = torch.cat([batch[key] for batch in batches])
        sha.update(np.array([*whole.shape, *whole.flatten().tolist()], dtype="<i8").tobytes())
    sha.update(json.dumps([name for batch in batches for name in batch["sources"]]).encode())
    return sha.hexdigest()


def microbatches(batch: Any, size: int) -> list[Any]:
    """Cut a rank's sequences into microbatches, as a training loop does."""
    rows = len(batch["sources"])
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, rows, size)]


def run_in_parts(make_loader: Callable[..., Loader], parts: list[Any]) -> tuple[list[str], str | None]:
    """Run parts, each resumed from the JSON state of the one before; give each step's digest, and the last state.

    `make_loader` takes the keywords of Loader that may change; each part is (world_size, workers, prefetch, microbatch,
    steps). The microbatch size need not divide anything.
    """
    saved, digests = None, []
    for world_size, workers, prefetch, microbatch, steps in parts:
        ranks = [
            make_loader(rank=r, world_size=world_size, workers=workers, prefetch=prefetch) for r in range(world_size)
        ]
        if saved is not None:
            for loader in ranks:
                loader.load_state_dict(json.loads(saved))
        for _ in range(steps):
            batches = [next(loader, None) for loader in ranks]
            if batches[0] is None:
                assert batches == [None] * world_size, "ranks disagree about the end"
                break
            digests.append(digest([micro for batch in batches for micro in microbatches(batch, microbatch)]))
        states = {json.dumps(loader.state_dict()) for loader in ranks}
        assert len(states) == 1, "ranks disagree about where they are"
        saved = states.pop()
        for loader in ranks:
            loader.close()
    return digests, saved
