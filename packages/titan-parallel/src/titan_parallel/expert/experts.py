"""Expert parallelism: each rank of `ep` holds some of the experts, and rows travel to them and back."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from titan_parallel.errors import LayoutError
from titan_parallel.expert.all_to_all import with_exchange
from titan_parallel.plan import ParallelPlan, find_modules
from titan_parallel.tensor.local_parameters import Use, read_locally


def find_experts(model: nn.Module, plan: ParallelPlan) -> dict[str, nn.Module]:
    """Return the modules of a model, or of a part of one, that the plan names as experts."""
    return find_modules(model, plan.get("experts", ()))


def check_experts(model: nn.Module, plan: ParallelPlan, ep: int) -> None:
    """Check that the experts are as the plan says, and that `ep` ranks can share them.

    Raises:
        LayoutError: With every weight that does not fit.
    """
    stated = plan.get("n_experts")
    wrong: list[str] = []
    for name, module in find_experts(model, plan).items():
        for key, parameter in module.named_parameters(name):
            n_experts = parameter.shape[0] if parameter.ndim else 0
            if stated is not None and n_experts != stated:
                wrong.append(
                    f"{key} {list(parameter.shape)} has {n_experts} in dim 0, the plan's n_experts is {stated}"
                )
            elif n_experts == 0 or n_experts % ep:
                wrong.append(f"ep {ep} does not divide dim 0 of {key} {list(parameter.shape)}")
    if wrong:
        raise LayoutError(f"experts hold one expert for each entry of dim 0 of every weight: {'; '.join(wrong)}")


def spread_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank its experts, in place, and put the exchange of rows around them.

    Args:
        experts: Its parameters are plain and equal on all ranks, or split by tensor parallelism.
        mesh: From `build_mesh`.
    """
    ep = mesh["ep"]
    for module in experts.modules():
        plain: dict[str, Use] = {}
        for key, parameter in list(module.named_parameters(recurse=False)):
            whole = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            # A copy, so that the whole is freed.
            part = whole.detach().chunk(ep.size())[ep.get_local_rank()].clone()
            split = parameter.placements if isinstance(parameter, DTensor) else ()
            placed = DTensor.from_local(part, mesh["ep", "tp"] if split else ep, [Shard(0), *split], run_check=False)
            module.register_parameter(key, nn.Parameter(placed, requires_grad=parameter.requires_grad))
            if not split:
                plain[key] = "own"
        read_locally(module, plain)
    _exchange_rows(experts, ep.get_group())


def _exchange_rows(experts: nn.Module, group: dist.ProcessGroup) -> None:
    kind: Any = type(experts)

    def forward(self: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
        return with_exchange(lambda *args: kind.forward(self, *args), x, counts, group)

    # A subclass and no hooks: these would have to hand over what they know of one call through the module.
    experts.__class__ = type(f"Spread{kind.__name__}", (kind,), {"forward": forward})


def placement_of_shards(parameter: nn.Parameter, ranks: int) -> Shard:
    """Return the dim over which FSDP shards an expert's parameter: evenly, and one not split yet if there is any.

    Args:
        parameter: Spread by `spread_experts`.
        ranks: How many share it.

    Raises:
        LayoutError: If no dim can be divided.
    """
    assert isinstance(parameter, DTensor)
    shape = list(parameter.to_local().shape)
    dim = shard_dim(shape, parameter.placements, ranks)
    if dim is None:
        raise LayoutError(
            f"weights of experts that are {shape} on each rank cannot be sharded evenly over {ranks} ranks "
            "(dp_shard x cp): take a dp_shard that divides one of these, and dp_replicate for the rest"
        )
    return Shard(dim)


def shard_dim(shape: list[int], placements: tuple[Placement, ...], ranks: int) -> int | None:
    """Return the first dim of the local `shape` that `ranks` divide; those in `placements` are the second choice."""
    split = {placement.dim for placement in placements if isinstance(placement, Shard)}
    dims = sorted(range(len(shape)), key=lambda dim: dim in split)
    return next((dim for dim in dims if shape[dim] % ranks == 0 and shape[dim]), None)
