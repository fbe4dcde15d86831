"""`verify_shards`: check every byte of token shards."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titan_data.errors import DataError
from titan_data.shards.digest import check_digest
from titan_data.shards.folder import check_header
from titan_data.shards.format import (
    HEADER_SIZE,
    MANIFEST,
    OFFSETS,
    Manifest,
    ShardEntry,
    offsets_start,
    read_manifest,
    shard_size,
    token_dtype,
)
from titan_data.shards.mmap import map_array

_CHUNK = 1 << 24  # bytes


class CorruptFile(NamedTuple):
    """A corrupt file, and what is wrong with it."""

    file: str
    what: str


def verify_shards(
    path: str | Path, *, workers: int | None = None, report: Callable[[int, int], None] | None = None
) -> list[CorruptFile]:
    """Read all files of a folder of token shards and check them.

    Every file must exist, be complete and have the checksum of when it was written. In every shard the documents must
    cover the tokens, and every id must be in the vocabulary.

    Args:
        path: A folder of token shards.
        workers: Number of threads; None for one per core.
        report: Called with the number of bytes checked so far, and in total.

    Returns:
        The corrupt files in the order of the manifest; empty if all files are valid.

    Raises:
        DataError: If the folder contains no finished token shards.
    """
    folder = Path(path).expanduser()
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        if not (folder / MANIFEST).exists():
            raise
        return [CorruptFile(MANIFEST, str(error))]
    dtype = token_dtype(manifest.job.vocab_size)
    sizes = [shard_size(shard.documents, shard.tokens, dtype) for shard in manifest.shards]
    sizes.append(8 * (manifest.documents + 1))
    found: dict[int, CorruptFile] = {}
    done = 0
    with ThreadPoolExecutor(workers or os.cpu_count()) as threads:
        checks: dict[Future[CorruptFile | None], int] = {}
        for number, (shard, first) in enumerate(zip(manifest.shards, manifest.first_documents(), strict=True)):
            check = partial(_check_shard, folder, manifest, shard, first)
            checks[threads.submit(_find_corruption, shard.name, check)] = number
        checks[threads.submit(_find_corruption, OFFSETS, partial(_check_offsets, folder, manifest))] = len(sizes) - 1
        try:
            for finished in as_completed(checks):
                number = checks[finished]
                if (corrupt := finished.result()) is not None:
                    found[number] = corrupt
                done += sizes[number]
                if report is not None:
                    report(done, sum(sizes))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return [found[number] for number in sorted(found)]


def _find_corruption(name: str, check: Callable[[], None]) -> CorruptFile | None:
    try:
        check()
    except DataError as error:
        return CorruptFile(name, str(error))
    return None


def _check_shard(folder: Path, manifest: Manifest, shard: ShardEntry, first_document: int) -> None:
    path, dtype = folder / shard.name, token_dtype(manifest.job.vocab_size)
    _check_size(path, shard_size(shard.documents, shard.tokens, dtype))
    check_header(path, shard, first_document)
    check_digest(path, HEADER_SIZE, shard.sha256)
    # The checksum matches: what follows only fails if the shard was written incorrectly.
    offsets = map_array(path, "<i8", shard.documents + 1, offsets_start(shard.tokens, dtype))
    if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) < 0).any():
        raise DataError("the documents do not cover the tokens")
    tokens = map_array(path, dtype, shard.tokens, HEADER_SIZE)
    for start in range(0, shard.tokens, _CHUNK):
        if (largest := int(tokens[start : start + _CHUNK].max())) >= manifest.job.vocab_size:
            raise DataError(f"contains id {largest}, but the vocabulary has {manifest.job.vocab_size} ids")


def _check_offsets(folder: Path, manifest: Manifest) -> None:
    path = folder / OFFSETS
    _check_size(path, 8 * (manifest.documents + 1))
    check_digest(path, 0, manifest.offsets_sha256)


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if found != size:
        raise DataError(f"has {found} bytes instead of {size}")
