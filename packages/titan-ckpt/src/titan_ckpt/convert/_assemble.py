"""Putting a part of a tensor together from the pieces that it lies in."""

from collections.abc import Callable, Sequence

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, flaw_in_cover, intersection


def check_cover(name: str, shape: Sequence[int], pieces: Sequence[Box]) -> None:
    """See that pieces make up a tensor, each element once.

    Args:
        name: the tensor's, for the message.
        shape: the tensor's.
        pieces: the parts it is said to consist of.

    Raises:
        CheckpointError: when they do not, or the shape is none that a tensor can have.
    """
    flaw = flaw_in_cover(shape, pieces)
    if flaw is not None:
        raise CheckpointError(f"{name} {flaw}")


def assemble(
    dtype: torch.dtype, wanted: Box, pieces: Sequence[Box], read: Callable[[int, Box], torch.Tensor]
) -> torch.Tensor:
    """Put a part of a tensor together from the pieces that it touches.

    Args:
        dtype: the tensor's type.
        wanted: the part.
        pieces: the pieces of the tensor; those that the part touches are read.
        read: returns a part of a piece, by the piece's place in `pieces` and the box within that piece.

    Returns:
        The part.
    """
    part = torch.empty(wanted.lengths, dtype=dtype)
    for place, piece in enumerate(pieces):
        shared = intersection(wanted, piece)
        if shared is not None:
            part[shared.within(wanted).slices] = read(place, shared.within(piece))
    return part
