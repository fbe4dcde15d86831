"""State that follows from a rank's own part of the batch, such as a BatchNorm's: refused where ranks would differ.

`parallelize` calls `check_batch_norms`; `ParallelModel` calls `check_equal_buffers` after its first training step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from titan_parallel.errors import LayoutError
from titan_parallel.plan import clean_name

_SHOWN = 4  # names in a message


def check_batch_norms(model: nn.Module, mesh: DeviceMesh) -> None:
    """Check that no norm in training mode normalizes over the rows of this rank only, where others have more rows.

    Raises:
        LayoutError: If there are BatchNorms that do not normalize over all data-parallel ranks.
    """
    ranks = sorted(mesh["dp_replicate", "dp_shard", "cp", "ep"].mesh.flatten().tolist())
    if len(ranks) == 1:
        return
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    alone = [name for name, module in norms.items() if module.training and _ranks_of(module) != ranks]
    if alone:
        more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
        raise LayoutError(
            f"model: {', '.join(alone[:_SHOWN])}{more}: a {type(norms[alone[0]]).__name__} would normalize each rank's "
            f"part of the batch by itself; on CUDA convert the model by nn.SyncBatchNorm.convert_sync_batchnorm(model, "
            f"process_group), with a group of the ranks {ranks}; or freeze them by .eval(), or use nn.GroupNorm"
        )


def _ranks_of(norm: nn.Module) -> list[int]:
    if not isinstance(norm, nn.SyncBatchNorm):
        return []
    return sorted(dist.get_process_group_ranks(norm.process_group))


@torch.no_grad()
def check_equal_buffers(parts: Sequence[nn.Module], mesh: DeviceMesh) -> LayoutError | None:
    """Return the error if persistent buffers differ between ranks with different data; all ranks call this together.

    Experts that `ep` distributes have buffers of their own on each rank of `ep`, so these ranks are not compared.
    """
    mine = {
        clean_name(f"{prefix}.{key}".lstrip(".")): _digest(buffer)
        for part in parts
        for prefix, module in part.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    }
    key = tuple(mesh[name].get_local_rank() for name in ("pp", "ep", "tp"))
    ranks = [(key, mine)] * dist.get_world_size()
    if len(ranks) > 1 and dist.get_backend() != "fake":
        dist.all_gather_object(ranks, (key, mine))
    first: dict[tuple[int, ...], int] = {}
    for rank, (place, digests) in enumerate(ranks):
        other = first.setdefault(place, rank)
        wrong = [name for name, digest in digests.items() if ranks[other][1].get(name) != digest]
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            return LayoutError(
                f"model: after a step the buffers {', '.join(wrong[:_SHOWN])}{more} differ between ranks {other} and "
                f"{rank}, which have different data, and only one would be saved; in the model's forward compute them "
                "from all ranks' data (torch.distributed.all_reduce), or register them with persistent=False if they "
                "belong to each rank"
            )
    return None


def _digest(buffer: Tensor) -> str:
    local = buffer.to_local() if isinstance(buffer, DTensor) else buffer
    return hashlib.sha256(local.cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()[:8]
