"""Expert parallelism: each rank of `ep` holds some of the experts.

`parallelize` calls `spread_experts` after tensor parallelism; `fsdp` asks for the sharding of their parameters.
"""

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
    """Return the modules of a model, or of a part of one, that are in `plan["experts"]`."""
    return find_modules(model, plan.get("experts", ()))


def check_experts(model: nn.Module, plan: ParallelPlan, ep: int) -> None:
    """Check that the experts' weights agree with the plan and divide over `ep` ranks.

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
        raise LayoutError(f"plan['experts']: every weight must have one expert per entry of dim 0: {'; '.join(wrong)}")


def spread_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this rank's experts only, in place, and put the exchange of rows around the module's forward.

    The module becomes an instance of a new subclass of its class, named `Spread<class>`: `repr` and `type(module)`
    change, `isinstance` does not, and the module can no longer be pickled.

    Args:
        experts: A module whose parameters are unsharded and equal on all ranks, or split by tensor parallelism.
        mesh: From `build_mesh`.
    """
    ep = mesh["ep"]
    for module in experts.modules():
        unsharded: dict[str, Use] = {}
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            # A copy, so that the full tensor is freed.
            part = full.detach().chunk(ep.size())[ep.get_local_rank()].clone()
            split = parameter.placements if isinstance(parameter, DTensor) else ()
            placed = DTensor.from_local(part, mesh["ep", "tp"] if split else ep, [Shard(0), *split], run_check=False)
            module.register_parameter(key, nn.Parameter(placed, requires_grad=parameter.requires_grad))
            if not split:
                unsharded[key] = "own"
        read_locally(module, unsharded)
    _exchange_rows(experts, ep.get_group())


def _exchange_rows(experts: nn.Module, group: dist.ProcessGroup) -> None:
    kind: Any = type(experts)

    def forward(self: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
        return with_exchange(lambda *args: kind.forward(self, *args), x, counts, group)

    # A subclass, not hooks: a pre-hook and a hook would have to share the state of a call through the module.
    experts.__class__ = type(f"Spread{kind.__name__}", (kind,), {"forward": forward})


def placement_of_shards(parameter: nn.Parameter, ranks: int) -> Shard:
    """Return the dim over which FSDP shards an expert's parameter: one that divides evenly, preferably not split yet.

    Args:
        parameter: A parameter distributed by `spread_experts`.
        ranks: Number of ranks that share it.

    Raises:
        LayoutError: If no dim divides evenly.
    """
    assert isinstance(parameter, DTensor)
    shape = list(parameter.to_local().shape)
    dim = shard_dim(shape, parameter.placements, ranks)
    if dim is None:
        raise LayoutError(
            f"weights of experts of shape {shape} on each rank cannot be sharded evenly over {ranks} ranks "
            "(dp_shard x cp); set a dp_shard that divides one of these sizes, and use dp_replicate for the rest"
        )
    return Shard(dim)


def shard_dim(shape: list[int], placements: tuple[Placement, ...], ranks: int) -> int | None:
    """Return the first dim of the local `shape` that `ranks` divide, or None; dims split by `placements` come last."""
    split = {placement.dim for placement in placements if isinstance(placement, Shard)}
    dims = sorted(range(len(shape)), key=lambda dim: dim in split)
    return next((dim for dim in dims if shape[dim] % ranks == 0 and shape[dim]), None)
