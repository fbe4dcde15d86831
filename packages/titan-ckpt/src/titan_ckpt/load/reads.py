"""From files to tensors: read the checksum pieces that hold the wanted data, verify each, and copy from it.

A piece is copied only after it has matched its checksum, so corrupt data never reaches a tensor, and each piece is read
once. Besides the tensors, memory holds one piece per thread. Called by `loading` (planned first, so that ranks can
compare what they read) and by `reader` (`fill`).
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, boxes_of_range, intersection
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.index import Chunk, TensorSpec
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.storage.direct_io import BLOCK, allocate_buffer
from titan_ckpt.threads import parallel_map


@dataclass(frozen=True)
class Wanted:
    """A slice of a tensor in a checkpoint, and the tensor to fill with it.

    Attributes:
        name: The tensor's name in the checkpoint.
        spec: Its metadata in the checkpoint.
        box: The slice.
        destination: A tensor of the slice's shape, on any device, with any strides; values are cast to its dtype.
    """

    name: str
    spec: TensorSpec
    box: Box
    destination: torch.Tensor


@dataclass(frozen=True)
class _Job:
    """One piece of one chunk, needed for one tensor."""

    wanted: Wanted
    chunk: Chunk
    part: Box  # what is needed of the chunk, relative to the chunk
    number: int  # index of the piece in the chunk
    at: int  # start of the piece in the chunk, in bytes
    start: int  # start of the piece in the file, in bytes
    nbytes: int


@dataclass(frozen=True)
class Reads:
    """A read plan.

    Attributes:
        groups: Adjacent pieces, each group read with one request.
        nbytes: Total size in bytes.
        problems: Corruption found while planning, one sentence each.
        pinned: Whether any destination is on a GPU, so that buffers are pinned.
    """

    groups: Sequence[list[_Job]]
    nbytes: int
    problems: Sequence[str]
    pinned: bool


def fill(files: TensorFiles, piece_bytes: int, wanted: Iterable[Wanted]) -> list[str]:
    """Fill tensors from a checkpoint that no other process of this machine reads.

    Args:
        files: The checkpoint's files.
        piece_bytes: Bytes per checksum.
        wanted: What to fill.

    Returns:
        See `execute_reads`.
    """
    return execute_reads(files, plan_reads(files, piece_bytes, wanted), bypass_cache=True)


def plan_reads(files: TensorFiles, piece_bytes: int, wanted: Iterable[Wanted]) -> Reads:
    """Find the pieces that hold the wanted slices, and join adjacent ones into larger reads.

    Args:
        files: The checkpoint's files.
        piece_bytes: Bytes per checksum.
        wanted: What to fill.

    Returns:
        The plan.
    """
    jobs: list[_Job] = []
    problems: list[str] = []
    pinned = False
    for want in wanted:
        pinned |= want.destination.is_cuda
        try:
            jobs += _jobs_of(files, piece_bytes, want)
        except CheckpointError as error:
            problems.append(f"{error} (needed for {want.name})")
    jobs.sort(key=lambda job: (job.chunk.file, job.start))
    groups = list(_grouped(jobs, piece_bytes))
    return Reads(groups, sum(job.nbytes for job in jobs), problems, pinned)


def execute_reads(files: TensorFiles, reads: Reads, *, bypass_cache: bool) -> list[str]:
    """Read, verify and copy, with several threads.

    Args:
        files: The checkpoint's files.
        reads: The plan.
        bypass_cache: Whether to read past the page cache, because no other process of this machine reads the same.

    Returns:
        The corruption found, one sentence each; empty if everything was filled. Corrupt data is not copied but valid
        data is, so in case of corruption the tensors are partly filled.
    """
    if not reads.groups:
        return _distinct(reads.problems)
    size = max(_span(group).stop - _span(group).start for group in reads.groups)
    buffers = threading.local()

    def work(group: list[_Job]) -> list[str]:
        if not hasattr(buffers, "buffer"):
            buffers.buffer = (
                torch.empty(size, dtype=torch.uint8, pin_memory=True)
                if reads.pinned
                else torch.frombuffer(allocate_buffer(size), dtype=torch.uint8)
            )
        return _read_group(files, group, buffers.buffer, bypass_cache=bypass_cache)

    found = parallel_map(work, reads.groups, files.parallel, "titan-ckpt-read")
    return _distinct([*reads.problems, *(problem for of_group in found for problem in of_group)])


def _jobs_of(files: TensorFiles, piece_bytes: int, wanted: Wanted) -> Iterator[_Job]:
    """Yield the pieces that hold a wanted slice.

    In each chunk that overlaps the slice, these are the pieces from the slice's first byte to its last one. Pieces in
    between may hold none of it when the slice is narrow; reading them in one request is cheaper than skipping them.
    """
    itemsize = wanted.spec.dtype.itemsize
    for chunk in wanted.spec.chunks:
        shared = intersection(chunk.box, wanted.box)
        if shared is None:
            continue
        entry = files.entry_of(wanted.name, wanted.spec, chunk, piece_bytes)
        part = shared.within(chunk.box)
        last = tuple(at + length - 1 for at, length in zip(*part, strict=True))
        first_byte = _position(chunk.lengths, part.offsets) * itemsize
        last_byte = _position(chunk.lengths, last) * itemsize
        for number in range(first_byte // piece_bytes, last_byte // piece_bytes + 1):
            start = number * piece_bytes
            nbytes = min(piece_bytes, entry.nbytes - start)
            yield _Job(wanted, chunk, part, number, start, entry.start + start, nbytes)


def _position(shape: Sequence[int], index: Sequence[int]) -> int:
    """Return the row-major position of an element."""
    position = 0
    for size, at in zip(shape, index, strict=True):
        position = position * size + at
    return position


def _grouped(jobs: Sequence[_Job], most: int) -> Iterator[list[_Job]]:
    """Join adjacent pieces up to `most` bytes, so that many small tensors become one read."""
    group: list[_Job] = []
    for job in jobs:
        if group:
            first, last = group[0], group[-1]
            adjacent = last.chunk.file == job.chunk.file and last.start + last.nbytes == job.start
            if not adjacent or job.start + job.nbytes - first.start > most:
                yield group
                group = []
        group.append(job)
    if group:
        yield group


def _span(group: Sequence[_Job]) -> range:
    """Return the byte range of the file to read for a group, rounded to disk blocks."""
    first, last = group[0], group[-1]
    return range(first.start // BLOCK * BLOCK, -(-(last.start + last.nbytes) // BLOCK) * BLOCK)


def _read_group(files: TensorFiles, group: list[_Job], buffer: torch.Tensor, *, bypass_cache: bool) -> list[str]:
    """Read a group with one request, verify each piece, and copy the valid ones."""
    source, _ = files[group[0].chunk.file]
    start, stop = _span(group).start, min(_span(group).stop, source.size)
    try:
        source.read_into(start, memoryview(as_buffer(buffer[: stop - start])), bypass_cache=bypass_cache)
    except OSError as error:
        return [f"{job.chunk.file} cannot be read ({error}), needed for {job.wanted.name}" for job in group]
    problems = []
    for job in group:
        piece = buffer[job.start - start : job.start - start + job.nbytes]
        if checksum(as_buffer(piece)) != job.chunk.checksums[job.number]:
            problems.append(f"{job.chunk.file} does not match its checksum in the tensor {job.wanted.name}")
        else:
            _copy(job, piece)
    return problems


def _copy(job: _Job, piece: torch.Tensor) -> None:
    """Copy the wanted elements of a piece to their destination.

    The piece is a range of the chunk's elements, so it is cut into boxes first; each is intersected with what is wanted
    of the chunk, and the intersection is copied.
    """
    dtype, wanted = job.wanted.spec.dtype, job.wanted
    first = job.at // dtype.itemsize  # index of the piece's first element in the chunk
    if piece.storage_offset() % dtype.itemsize:  # only in files that other programs wrote
        piece = piece.clone()
    elements = piece.view(dtype)
    # The region of the destination that this chunk fills; its first element is the first of `job.part`.
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


def _distinct(problems: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(problems))
