"""Data parallelism through FSDP2: sharded, replicated, or both (HSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titan_parallel.errors import LayoutError
from titan_parallel.expert.experts import placement_of_shards
from titan_parallel.mesh import fsdp_mesh
from titan_parallel.options import ParallelOptions, reshard_blocks
from titan_parallel.plan import Roles, clean_name

_SHOWN = 4  # names in a message


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    roles: Roles,
    tied: bool,
    experts: Sequence[nn.Module],
    options: ParallelOptions,
) -> None:
    """Shard `model` in place, one unit for each block, so that only one block's weights are whole at a time.

    Gradients are summed over the ranks, not averaged: the loss is divided by the global batch's normaliser instead.

    Args:
        model: The root; holds whatever is in no unit.
        mesh: From `build_mesh`.
        roles: Names of its modules before the blocks, a unit each; of the blocks, a unit each; of those after them,
            one unit, which stays gathered, since its backward comes at once.
        tied: Whether a weight is shared between the modules before and after, which makes one unit of them.
        experts: Modules spread by expert parallelism; each is a unit in that of its block, over fewer ranks.
        options: Dtypes, resharding and offloading.

    Raises:
        LayoutError: If it has parameters that FSDP2 does not take.
    """
    _check_parameters(model)
    data_mesh = fsdp_mesh(mesh)
    # The root casts what comes in from outside; inside, the dtypes are right (and fp32 rotary angles must stay fp32).
    outer = MixedPrecisionPolicy(param_dtype=options.param_dtype, reduce_dtype=_reduce_dtype(options))
    inner = MixedPrecisionPolicy(
        param_dtype=options.param_dtype, reduce_dtype=_reduce_dtype(options), cast_forward_inputs=False
    )

    freed = reshard_blocks(options, mesh["pp"].size())
    before, blocks, after = ([model.get_submodule(name) for name in names] for names in astuple(roles))

    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if options.cpu_offload else OffloadPolicy()

    def shard(unit: nn.Module | list[nn.Module], reshard: bool | int) -> None:
        fully_shard(unit, mesh=data_mesh, mp_policy=inner, reshard_after_forward=reshard, offload_policy=offload)

    for unit in experts:
        own_mesh = fsdp_mesh(mesh, experts=True)
        fully_shard(
            unit,
            mesh=own_mesh,
            mp_policy=inner,
            reshard_after_forward=freed,
            offload_policy=offload,
            shard_placement_fn=partial(placement_of_shards, ranks=own_mesh.shape[-1]),
        )
    for unit in [] if tied else before:
        shard(unit, freed)
        if isinstance(unit, nn.Embedding) and isinstance(unit, FSDPModule):
            unit.set_unshard_in_backward(False)  # the gradient of a table does not depend on the table
    for unit in blocks:
        shard(unit, freed)
    if after:
        shard([*before, *after] if tied else after, False)
    fully_shard(model, mesh=data_mesh, mp_policy=outer, reshard_after_forward=False, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this a factor of 1 asks gloo for a kind of reduction that it does not have.
            module.set_force_sum_reduction_for_comms(True)


def _check_parameters(model: nn.Module) -> None:
    named = [(clean_name(name), parameter) for name, parameter in model.named_parameters()]
    wrong = [f"{name} has no dims, make its shape [1]" for name, parameter in named if not parameter.ndim]
    wrong += [
        f"{name} {list(parameter.shape)} has strides {list(parameter.stride())}, make its data contiguous"
        for name, parameter in named
        if not parameter.is_contiguous()
    ]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise LayoutError(
            f"parameters of {type(model).__name__} that cannot be sharded: {'; '.join(wrong[:_SHOWN])}{more}"
        )


def set_last_microbatch(model: nn.Module, is_last: bool, *, reduce_every: bool) -> None:
    """Tell FSDP whether more microbatches of this step follow: replicas exchange gradients on the last one only.

    Args:
        model: A part, parallelized.
        is_last: Whether none follows.
        reduce_every: Whether shards are summed after each microbatch, or whole gradients kept until the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or reduce_every)
        model.set_requires_all_reduce(is_last)
        model.set_is_last_backward(is_last)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that units keep for a backward which does not come.

    They would stand in for the parameters until the next backward, even after an optimizer step.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _reduce_dtype(options: ParallelOptions) -> torch.dtype | None:
    return options.reduce_dtype if options.param_dtype is not None else None
