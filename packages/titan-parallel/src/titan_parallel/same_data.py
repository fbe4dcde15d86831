"""A check that the ranks that share sequences got the same ones; `ParallelModel` makes it in its first call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel._torch_compat import tree_leaves
from titan_parallel.errors import LayoutError
from titan_parallel.mesh import data_axis

_SHARING = ("pp", "cp", "tp")


class Arguments(Protocol):
    """What a microbatch has."""

    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102

    @property
    def kwargs(self) -> Any: ...  # noqa: D102

    @property
    def target(self) -> Any: ...  # noqa: D102


def check_same_data(microbatches: Sequence[Arguments], mesh: DeviceMesh) -> None:
    """Check that ranks with the same place on the data axis got equal microbatches; all ranks must call it together.

    Args:
        microbatches: This rank's microbatches, before context parallelism cuts them.
        mesh: From `build_mesh`.

    Raises:
        LayoutError: On all ranks, if tensors or numbers differ.
    """
    sharing = [name for name in _SHARING if mesh[name].size() > 1]
    if not sharing or dist.get_backend() == "fake":
        return
    mine = data_axis(mesh).dp_rank, _digests(microbatches)
    ranks: list[tuple[int, dict[str, str]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    first: dict[int, int] = {}
    for rank, (place, digests) in enumerate(ranks):
        other = first.setdefault(place, rank)
        expected = ranks[other][1]
        wrong = [name for name in expected if digests.get(name, expected[name]) != expected[name]]
        if wrong:
            raise LayoutError(
                f"data: ranks {other} and {rank} share sequences ({' and '.join(sharing)}), but got different "
                f"{', '.join(wrong)}; read the data by `data_axis(mesh).dp_rank`, which is {place} on both"
            )


def _digests(microbatches: Sequence[Arguments]) -> dict[str, str]:
    """Return a digest of each argument. A target of None has none: not all stages of a pipeline need the target."""
    digests: dict[str, str] = {}
    for i, microbatch in enumerate(microbatches):
        named = {f"args[{k}]": value for k, value in enumerate(microbatch.args)} | dict(microbatch.kwargs)
        if microbatch.target is not None:
            named["target"] = microbatch.target
        for name, value in named.items():
            digests[f"{name} of microbatch {i}"] = _digest(value)
    return digests


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(value):
        if type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_meta:
            digest.update(repr((leaf.shape, leaf.dtype)).encode())
            digest.update(leaf.detach().resolve_conj().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(leaf, int | float | str | None):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:8]
