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

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, boxes_of_range, intersection
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.index import Chunk, TensorSpec
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.storage.direct_io import BLOCK, room


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
    at: int  # in the chunk, in bytes
    start: int  # in the file, in bytes
    nbytes: int


@dataclass(frozen=True)
class Reads:
    """What is to be read to fill some tensors.

    Attributes:
        groups: what is read at one stroke each.
        nbytes: how much that is.
        damages: what stands against reading already, one sentence each.
        pinned: whether anything of it goes to a GPU.
    """

    groups: Sequence[list[_Job]]
    nbytes: int
    damages: Sequence[str]
    pinned: bool


def fill(files: TensorFiles, piece_bytes: int, wanted: Iterable[Wanted]) -> list[str]:
    """Fill tensors from a checkpoint that nobody else reads.

    Args:
        files: the checkpoint's files.
        piece_bytes: how many bytes each checksum is of.
        wanted: what to fill.

    Returns:
        As of `carry_out`.
    """
    return carry_out(files, plan_reads(files, piece_bytes, wanted), once=True)


def plan_reads(files: TensorFiles, piece_bytes: int, wanted: Iterable[Wanted]) -> Reads:
    """Find out what to read.

    Args:
        files: the checkpoint's files.
        piece_bytes: how many bytes each checksum is of.
        wanted: what to fill.

    Returns:
        What to read for it.
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
    return Reads(groups, sum(job.nbytes for job in jobs), damages, pinned)


def carry_out(files: TensorFiles, reads: Reads, *, once: bool) -> list[str]:
    """Read, check and copy.

    Args:
        files: the checkpoint's files.
        reads: what to read.
        once: whether no other process of this machine reads the same.

    Returns:
        What is damaged, one sentence each; empty when everything was filled. Nothing damaged was copied, but what is
        sound was, so after damage the tensors are a mixture.
    """
    if not reads.groups:
        return _distinct(reads.damages)
    size = max(_span(group).stop - _span(group).start for group in reads.groups)
    buffers = threading.local()

    def work(group: list[_Job]) -> list[str]:
        if not hasattr(buffers, "buffer"):
            buffers.buffer = (
                torch.empty(size, dtype=torch.uint8, pin_memory=True)
                if reads.pinned
                else torch.frombuffer(room(size), dtype=torch.uint8)
            )
        return _read_group(files, group, buffers.buffer, once)

    if len(reads.groups) == 1 or files.parallel == 1:
        found = [work(group) for group in reads.groups]
    else:
        with ThreadPoolExecutor(min(files.parallel, len(reads.groups)), "titan-ckpt-read") as pool:
            found = list(pool.map(work, reads.groups))
    return _distinct([*reads.damages, *(told for part in found for told in part)])


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
            yield _Job(wanted, chunk, part, number, start, entry.start + start, nbytes)


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


def _span(group: Sequence[_Job]) -> range:
    """Return which bytes of the file are read for a group: whole blocks of the disk."""
    first, last = group[0], group[-1]
    return range(first.start // BLOCK * BLOCK, -(-(last.start + last.nbytes) // BLOCK) * BLOCK)


def _read_group(files: TensorFiles, group: list[_Job], buffer: torch.Tensor, once: bool) -> list[str]:
    source, _ = files[group[0].chunk.file]
    start, stop = _span(group).start, min(_span(group).stop, source.size)
    try:
        source.read_into(start, memoryview(as_buffer(buffer[: stop - start])), once=once)
    except OSError as error:
        return [f"{job.chunk.file} does not read ({error}), needed for {job.wanted.name}" for job in group]
    damages = []
    for job in group:
        piece = buffer[job.start - start : job.start - start + job.nbytes]
        if checksum(as_buffer(piece)) != job.chunk.checksums[job.number]:
            damages.append(f"{job.chunk.file} does not match its checksum in the tensor {job.wanted.name}")
        else:
            _copy(job, piece)
    return damages


def _copy(job: _Job, piece: torch.Tensor) -> None:
    """Copy what is wanted of a piece."""
    dtype, wanted = job.wanted.spec.dtype, job.wanted
    first = job.at // dtype.itemsize  # which element of the chunk the piece begins with
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


def _distinct(told: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(told))
