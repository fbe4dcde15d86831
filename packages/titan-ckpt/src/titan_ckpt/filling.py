"""From files to tensors: reads the pieces that hold what is wanted, checks each, and copies from it.

A piece is used once it has matched its checksum and not before, so nothing damaged ever reaches a tensor; and it is
read once. Besides the tensors, memory holds one piece per thread.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.boxes import Box, boxes_of_range, intersection
from titan_ckpt.checksum import checksum
from titan_ckpt.errors import CheckpointError
from titan_ckpt.index import Chunk, TensorSpec
from titan_ckpt.manifest import Manifest
from titan_ckpt.storage import SourceFile, Storage
from titan_ckpt.tensorfile import Entry, read_header


@dataclass(frozen=True)
class Wanted:
    """A part of a tensor, and where to put it.

    Attributes:
        name: the tensor's name in the checkpoint.
        spec: what the checkpoint says of it.
        box: the part.
        destination: a tensor of the part's shape, on any device, with any strides; another dtype than the
            checkpoint's is cast to.
    """

    name: str
    spec: TensorSpec
    box: Box
    destination: torch.Tensor


@dataclass(frozen=True)
class _Job:
    """One piece of one chunk, wanted for one tensor."""

    wanted: Wanted
    chunk: Chunk
    part: Box  # what is wanted of the chunk, counted from the chunk's own beginning
    number: int  # the piece's
    start: int  # in the file, in bytes
    nbytes: int


class TensorFiles:
    """The open safetensors files of one checkpoint; several threads may use it."""

    def __init__(self, storage: Storage, name: str, manifest: Manifest) -> None:
        self.parallel = storage.parallel
        self._storage, self._name, self._manifest = storage, name, manifest
        self._open: dict[str, tuple[SourceFile, dict[str, Entry]]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, file: str) -> tuple[SourceFile, dict[str, Entry]]:
        """Return an open file and its header.

        Raises:
            CheckpointError: when it is missing, not as long as the manifest says, or no safetensors file.
        """
        with self._lock:
            if file not in self._open:
                try:
                    source = self._storage.open(f"{self._name}/{file}")
                except OSError as error:
                    told = "is missing" if isinstance(error, FileNotFoundError) else f"does not read ({error})"
                    raise CheckpointError(f"{file} {told}") from error
                size = self._manifest.files[file].size
                try:
                    if source.size != size:
                        raise CheckpointError(f"{file} has {source.size} bytes instead of {size}")
                    self._open[file] = source, read_header(source, file)
                except BaseException:
                    source.close()
                    raise
            return self._open[file]

    def entry_of(self, name: str, spec: TensorSpec, chunk: Chunk, piece_bytes: int) -> Entry:
        """Return where a chunk lies in its file.

        Raises:
            CheckpointError: when the file's header and the index disagree.
        """
        entry = self[chunk.file][1].get(chunk.key)
        if entry is None or (entry.dtype, entry.shape) != (spec.dtype, chunk.lengths):
            held = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise CheckpointError(
                f"{chunk.file} holds {held} under {chunk.key!r}, where state.json says that {name} has "
                f"{spec.dtype} {list(chunk.lengths)}"
            )
        if len(chunk.checksums) != -(-entry.nbytes // piece_bytes):
            raise CheckpointError(f"state.json has {len(chunk.checksums)} checksums for {chunk.key!r}: not one a piece")
        return entry

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            for source, _ in self._open.values():
                source.close()
            self._open = {}


def fill(files: TensorFiles, piece_bytes: int, wanted: Iterable[Wanted]) -> list[str]:
    """Fill tensors from a checkpoint.

    Args:
        files: the checkpoint's files.
        piece_bytes: how many bytes each checksum is of.
        wanted: what to fill.

    Returns:
        What is damaged, one sentence each; empty when everything was filled. Nothing damaged was copied, but what is
        sound was, so after damage the tensors are a mixture.
    """
    jobs: list[_Job] = []
    damages: list[str] = []
    pinned = False
    for want in wanted:
        pinned |= want.destination.is_cuda
        try:
            jobs += _jobs_of(files, piece_bytes, want)
        except CheckpointError as error:
            damages.append(f"{error} (needed for {want.name})")
    jobs.sort(key=lambda job: (job.chunk.file, job.start))
    groups = list(_grouped(jobs, piece_bytes))
    if not groups:
        return _distinct(damages)
    size = max(group[-1].start + group[-1].nbytes - group[0].start for group in groups)
    buffers = threading.local()

    def work(group: list[_Job]) -> list[str]:
        if not hasattr(buffers, "buffer"):
            buffers.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return _read_group(files, piece_bytes, group, buffers.buffer)

    if len(groups) == 1 or files.parallel == 1:
        return _distinct(damages + [told for group in groups for told in work(group)])
    with ThreadPoolExecutor(min(files.parallel, len(groups)), thread_name_prefix="titan-ckpt-read") as pool:
        return _distinct(damages + [told for found in pool.map(work, groups) for told in found])


def _jobs_of(files: TensorFiles, piece_bytes: int, wanted: Wanted) -> Iterator[_Job]:
    itemsize = wanted.spec.dtype.itemsize
    for chunk in wanted.spec.chunks:
        shared = intersection(chunk.box, wanted.box)
        if shared is None:
            continue
        entry = files.entry_of(wanted.name, wanted.spec, chunk, piece_bytes)
        part = shared.within(chunk.box)
        # The run of bytes from the part's first element to its last; what lies between need not all belong to it.
        last = tuple(at + length - 1 for at, length in zip(*part, strict=True))
        first_byte = _position(chunk.lengths, part.offsets) * itemsize
        last_byte = _position(chunk.lengths, last) * itemsize
        for number in range(first_byte // piece_bytes, last_byte // piece_bytes + 1):
            start = number * piece_bytes
            nbytes = min(piece_bytes, entry.nbytes - start)
            yield _Job(wanted, chunk, part, number, entry.start + start, nbytes)


def _position(shape: Sequence[int], index: Sequence[int]) -> int:
    position = 0
    for size, at in zip(shape, index, strict=True):
        position = position * size + at
    return position


def _grouped(jobs: Sequence[_Job], most: int) -> Iterator[list[_Job]]:
    """Join pieces that lie side by side, so that many small tensors are one read."""
    group: list[_Job] = []
    for job in jobs:
        if group:
            first, last = group[0], group[-1]
            beside = last.chunk.file == job.chunk.file and last.start + last.nbytes == job.start
            if not beside or job.start + job.nbytes - first.start > most:
                yield group
                group = []
        group.append(job)
    if group:
        yield group


def _read_group(files: TensorFiles, piece_bytes: int, group: list[_Job], buffer: torch.Tensor) -> list[str]:
    start = group[0].start
    read = buffer[: group[-1].start + group[-1].nbytes - start]
    source, _ = files[group[0].chunk.file]
    try:
        source.read_into(start, memoryview(as_buffer(read)))
    except OSError as error:
        return [f"{job.chunk.file} does not read ({error}), needed for {job.wanted.name}" for job in group]
    damages = []
    for job in group:
        piece = read[job.start - start : job.start - start + job.nbytes]
        if checksum(as_buffer(piece)) != job.chunk.checksums[job.number]:
            damages.append(f"{job.chunk.file} does not match its checksum in the tensor {job.wanted.name}")
        else:
            _copy(job, piece, job.number * piece_bytes // job.wanted.spec.dtype.itemsize)
    return damages


def _copy(job: _Job, piece: torch.Tensor, first: int) -> None:
    """Copy what is wanted of a piece, whose first element is the chunk's number `first`."""
    dtype, wanted = job.wanted.spec.dtype, job.wanted
    if piece.storage_offset() % dtype.itemsize:  # only in files that others wrote
        piece = piece.clone()
    elements = piece.view(dtype)
    # The part of the destination that this chunk fills; its element 0 is the first of job.part.
    at = tuple(
        chunk_at + part_at - wanted_at
        for chunk_at, part_at, wanted_at in zip(job.chunk.offsets, job.part.offsets, wanted.box.offsets, strict=True)
    )
    target = wanted.destination[Box(at, job.part.lengths).slices]
    done = 0
    for box in boxes_of_range(job.chunk.lengths, first, first + elements.numel()):
        volume = math.prod(box.lengths)
        shared = intersection(box, job.part)
        if shared is not None:
            cut = elements[done : done + volume].view(box.lengths)[shared.within(box).slices]
            target[shared.within(job.part).slices].copy_(cut)
        done += volume


def as_buffer(tensor: torch.Tensor) -> Any:
    """Return the memory of a dense CPU tensor of bytes."""
    return tensor.numpy()


def _distinct(told: list[str]) -> list[str]:
    return list(dict.fromkeys(told))
