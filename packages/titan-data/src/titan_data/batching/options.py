"""Option groups of `Loader`: which share of a batch this rank gets, and how batches are read ahead."""

from dataclasses import dataclass

import torch

from titan_data.errors import DataError


@dataclass(frozen=True)
class Distribution:
    """This rank's share of each global batch: sequences `rank * G / world_size` to `(rank + 1) * G / world_size`.

    Both numbers are of the data axis: ranks that work on the same sequences, as in tensor parallelism, count once and
    pass the same `rank`.

    Attributes:
        rank: Number of this rank on the data axis.
        world_size: Number of ranks on the data axis.

    Raises:
        DataError: If `rank` is not in `range(world_size)`.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise DataError(f"world_size must be at least 1, not {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise DataError(
                f"rank must be in 0..{self.world_size - 1} for world_size = {self.world_size}, not {self.rank}"
            )


@dataclass(frozen=True)
class ReadAhead:
    """How batches are read ahead. Nothing here changes what is in them.

    Attributes:
        prefetch: Batches read ahead by a thread; 0 to read each when it is asked for.
        workers: Threads that tokenize texts ahead; 0 to tokenize where the batch is made. Most tokenizers release the
            GIL meanwhile.
        patience: Seconds to wait for a prefetched batch before a warning names the file that is being read; further
            warnings follow after twice as long each. The loader continues when the storage does.
        pin_memory: Copy the tensors to page-locked memory, from where a GPU copies them asynchronously.

    Raises:
        DataError: If a number is out of range, or `pin_memory` is set without an accelerator.
    """

    prefetch: int = 2
    workers: int = 0
    patience: float = 60.0
    pin_memory: bool = False

    def __post_init__(self) -> None:
        for name, value in (("prefetch", self.prefetch), ("workers", self.workers)):
            if value < 0:
                raise DataError(f"{name} must be at least 0, not {value}")
        if not self.patience > 0:
            raise DataError(f"patience must be more than 0 seconds, not {self.patience}")
        if self.pin_memory and not torch.accelerator.is_available():
            raise DataError("pin_memory=True needs an accelerator such as a CUDA GPU, but torch finds none")
