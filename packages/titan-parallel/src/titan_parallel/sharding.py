"""Data parallelism through FSDP2: sharded, replicated, or both (HSDP)."""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_parallel.mesh import fsdp_mesh
from titan_parallel.options import ParallelOptions
from titan_parallel.plan import Roles


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    roles: Roles,
    tied: bool,
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
        options: Dtypes and resharding.
    """
    data_mesh = fsdp_mesh(mesh)
    # The root casts what comes in from outside; inside, the dtypes are right (and fp32 rotary angles must stay fp32).
    outer = MixedPrecisionPolicy(param_dtype=options.param_dtype, reduce_dtype=_reduce_dtype(options))
    inner = MixedPrecisionPolicy(
        param_dtype=options.param_dtype, reduce_dtype=_reduce_dtype(options), cast_forward_inputs=False
    )

    before, blocks, after = ([model.get_submodule(name) for name in names] for names in astuple(roles))

    free = mesh["pp"].size() == 1 if options.reshard_after_forward is None else options.reshard_after_forward

    def shard(unit: nn.Module | list[nn.Module], reshard: bool) -> None:
        fully_shard(unit, mesh=data_mesh, mp_policy=inner, reshard_after_forward=reshard)

    for unit in [] if tied else before:
        shard(unit, free)
        if isinstance(unit, nn.Embedding) and isinstance(unit, FSDPModule):
            unit.set_unshard_in_backward(False)  # the gradient of a table does not depend on the table
    for unit in blocks:
        shard(unit, free)
    if after:
        shard([*before, *after] if tied else after, False)
    fully_shard(model, mesh=data_mesh, mp_policy=outer, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this a factor of 1 asks gloo for a kind of reduction that it does not have.
            module.set_force_sum_reduction_for_comms(True)


def set_last_microbatch(model: nn.Module, is_last: bool) -> None:
    """Tell FSDP whether more microbatches of this step follow: replicas exchange gradients on the last one only."""
    if isinstance(model, FSDPModule):
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
