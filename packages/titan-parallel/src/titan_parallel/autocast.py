"""Casts of `torch.autocast` around a call of `ParallelModel`: each forward makes its own.

torch keeps the casts of weights until the outermost `torch.autocast` ends. Weights that FSDP gathers again for the next
microbatch, and weights that an optimizer has updated in between, would be used as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def uncached_casts(device_type: str) -> Iterator[None]:
    """Run a call inside the caller's `torch.autocast`, if there is one, without its cache of casts.

    Args:
        device_type: Where the model computes, beside the host.
    """
    with ExitStack() as stack:
        for kind in dict.fromkeys(("cpu", device_type)):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False))
        yield


def forget_casts() -> None:
    """Drop the casts that a `torch.autocast` inside the model has kept; called before each forward."""
    torch.clear_autocast_cache()


def autocast_key(device_type: str) -> tuple[torch.dtype | None, ...]:
    """Return what the dtypes of a forward's results depend on: the dtypes that are cast to, None where nothing is."""
    kinds = dict.fromkeys(("cpu", device_type))
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)
