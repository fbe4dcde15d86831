"""Assemble a slice of a tensor from the chunks in which it is stored. Used by the readers of DCP and Meta formats."""

from collections.abc import Callable, Sequence

import torch

from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.boxes import Box, cover_problem, intersection


def check_cover(name: str, shape: Sequence[int], chunks: Sequence[Box]) -> None:
    """Check that chunks make up a tensor, each element exactly once.

    Args:
        name: The tensor's name, for the message.
        shape: Its shape.
        chunks: The slices it is stored in.

    Raises:
        CheckpointError: If they do not, or the shape is impossible.
    """
    problem = cover_problem(shape, chunks)
    if problem is not None:
        raise CheckpointError(f"{name} {problem}")


def assemble(
    dtype: torch.dtype, wanted: Box, chunks: Sequence[Box], read: Callable[[int, Box], torch.Tensor]
) -> torch.Tensor:
    """Assemble a slice of a tensor from the chunks that overlap it.

    Args:
        dtype: The tensor's dtype.
        wanted: The slice.
        chunks: The chunks of the tensor; those that overlap the slice are read.
        read: Returns a part of a chunk, given the chunk's index in `chunks` and the box within that chunk.

    Returns:
        The slice.
    """
    with system_errors("assemble a tensor"):
        result = torch.empty(wanted.lengths, dtype=dtype)
    for index, chunk in enumerate(chunks):
        shared = intersection(wanted, chunk)
        if shared is not None:
            result[shared.within(wanted).slices] = read(index, shared.within(chunk))
    return result
