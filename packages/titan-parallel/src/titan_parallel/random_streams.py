"""Random numbers of a training step: ranks with different tokens or different layers draw different dropout masks.

`ParallelModel.forward_backward` runs in `own_random_stream`. Tensor-parallel ranks draw the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh

_DIMS = ("dp_replicate", "dp_shard", "ep", "cp", "pp")  # along these, ranks have different tokens or different layers


def stream_index(mesh: DeviceMesh) -> int | None:
    """Return which random stream this rank draws from, equal within a tp group; None if all ranks draw from one."""
    index, streams = 0, 1
    for name in _DIMS:
        index = index * mesh[name].size() + mesh[name].get_local_rank()
        streams *= mesh[name].size()
    return index if streams > 1 else None


def random_digest(device_type: str) -> int:
    """Return 48 bits of a hash of the state of torch's random generators, without waiting for the device."""
    return int.from_bytes(hashlib.sha256(_state(device_type)).digest()[:6], "little")


class Drawn:
    """Whether a step has drawn random numbers; False until the step has ended."""

    def __init__(self) -> None:
        self.any = False


@contextmanager
def own_random_stream(index: int | None, device_type: str) -> Iterator[Drawn]:
    """Draw from a stream of this rank's own, which follows from the state of torch's generators and `index`.

    Afterwards torch's generators are where they were, but for one number if the step drew any, so that the next step
    draws others. Nothing else is kept: whoever restores the state of torch's generators repeats the steps after it.

    Args:
        index: From `stream_index`; None draws from torch's generators as they are.
        device_type: Where the model computes, beside the host.
    """
    drawn = Drawn()
    if index is None:
        before = _state(device_type)
        yield drawn
        drawn.any = _state(device_type) != before
        return
    seed = (random_digest(device_type) << 15) + index
    with torch.random.fork_rng([torch.cuda.current_device()] if device_type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device_type == "cuda":
            torch.cuda.manual_seed(seed)
        before = _state(device_type)
        yield drawn
        drawn.any = _state(device_type) != before
    if drawn.any:
        torch.rand((), device="cpu")


def _state(device_type: str) -> bytes:
    states = [torch.get_rng_state()]
    if device_type == "cuda":
        states.append(torch.cuda.get_rng_state())  # kept on the host
    return b"".join(state.numpy().tobytes() for state in states)
