"""Data parallelism through FSDP2: sharded, replicated, or both (HSDP).

`parallelize` calls `apply_fsdp` last of all transforms; the runs call `set_last_microbatch` before each microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial

import torch
import torch.distributed as dist
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
    """Shard `model` in place, with one unit per block, so that only one block's weights are unsharded at a time.

    Gradients are summed over the ranks, not averaged: the loss is divided by the global number of target tokens.

    Args:
        model: The model; its root unit holds the parameters that are in no other unit.
        mesh: From `build_mesh`.
        roles: Names of the modules before the blocks, one unit each; of the blocks, one unit each; and of those after
            them, one unit together, which stays gathered because its backward follows at once.
        tied: Whether a weight is shared between the modules before and after, which then are one unit.
        experts: Modules distributed by expert parallelism; each is a unit within that of its block, over fewer ranks.
        options: Dtypes, resharding and offloading.

    Raises:
        LayoutError: If the model has parameters that FSDP2 does not support.
    """
    _check_parameters(model)
    # The root casts the model's inputs; inside, dtypes are right already (and fp32 rotary angles must stay fp32).
    root, inner = (_mixed_precision(options, cast_inputs=cast) for cast in (True, False))
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if options.cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=fsdp_mesh(mesh), offload_policy=offload)
    shard_unit = partial(shard, mp_policy=inner, reshard_after_forward=reshard_blocks(options, mesh["pp"].size()))
    before, blocks, after = ([model.get_submodule(name) for name in names] for names in astuple(roles))
    for unit in experts:
        own_mesh = fsdp_mesh(mesh, experts=True)
        placement = partial(placement_of_shards, ranks=own_mesh.shape[-1])
        shard_unit(unit, mesh=own_mesh, shard_placement_fn=placement)
    for unit in [] if tied else before:
        shard_unit(unit)
        if isinstance(unit, nn.Embedding) and isinstance(unit, FSDPModule):
            # An embedding's gradient does not depend on its table, so backward does not gather it.
            unit.set_unshard_in_backward(unshard_in_backward=False)
    for unit in blocks:
        shard_unit(unit)
    if after:
        shard_unit([*before, *after] if tied else after, reshard_after_forward=False)
    shard(model, mp_policy=root, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Otherwise FSDP2 implements a factor of 1 with a reduction that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
    # Otherwise gradients are wrong where ranks use different parameters; before torch 2.15 `Step` refuses such a step.
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def _check_parameters(model: nn.Module) -> None:
    named = [(clean_name(name), parameter) for name, parameter in model.named_parameters()]
    wrong = [f"{name} is a scalar, give it the shape [1]" for name, parameter in named if not parameter.ndim]
    wrong += [
        f"{name} {list(parameter.shape)} has the strides {list(parameter.stride())}, make it contiguous"
        for name, parameter in named
        if not parameter.is_contiguous()
    ]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise LayoutError(
            f"{type(model).__name__} has parameters that FSDP2 cannot shard: {'; '.join(wrong[:_SHOWN])}{more}"
        )


def set_last_microbatch(model: nn.Module, *, is_last: bool, reduce_every: bool) -> None:
    """Prepare FSDP for a microbatch: gradients are summed over replicas in the last one of a step only.

    Args:
        model: A parallelized part of the model.
        is_last: Whether this is the last microbatch of the step.
        reduce_every: Whether gradients are summed over the shards after each microbatch, or only after the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or reduce_every)
        model.set_requires_all_reduce(is_last)
        model.set_is_last_backward(is_last)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that units keep for a backward, if no backward follows.

    Otherwise they would be used instead of the parameters until the next backward, even after an optimizer step.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def units_of(model: nn.Module) -> list[tuple[str, FSDPModule]]:
    """Return the units of a part of the model, by their names in the original model; "" is the root."""
    return [(clean_name(name), unit) for name, unit in model.named_modules() if isinstance(unit, FSDPModule)]


@contextmanager
def checking_units(model: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Check in each forward that all ranks call the same units in the same order, before their weights are gathered.

    A rank that gathers the weights of another unit than the others would get theirs, or wait forever. Each check is an
    exchange, so this is for the first step. Compiled units are not checked: no graph can contain an exchange.

    Args:
        model: A part of the model on this rank.
        mesh: From `build_mesh`.
    """
    full = fsdp_mesh(mesh)
    sizes = {} if dist.get_backend() == "fake" else {dim: full.size(dim) for dim in range(full.ndim)}
    groups = [full.get_group(dim) for dim, size in sizes.items() if size > 1]

    def check(name: str) -> None:
        names: list[tuple[int, str]] = [(dist.get_rank(), name)]
        for group in groups:
            gathered: list[list[tuple[int, str]]] = [names] * group.size()
            dist.all_gather_object(gathered, names, group=group)
            names = [one for some in gathered for one in some]
        rank, other = next(((rank, other) for rank, other in names if other != names[0][1]), (0, names[0][1]))
        if other != names[0][1]:
            raise LayoutError(
                f"FSDP: rank {names[0][0]} came to {names[0][1]} where rank {rank} came to {other}; ranks that share "
                "weights must call the same modules of the plan in the same order: call the missing one on all ranks, "
                "for example with a masked input, or leave it out of `blocks`, `before` and `after`"
            )

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: check(name)

    handles = [
        unit.register_forward_pre_hook(hook(name or "the model's forward"), prepend=True)
        for name, unit in units_of(model)
        if isinstance(unit, nn.Module) and unit._compiled_call_impl is None
    ]
    handles.append(model.register_forward_hook(hook("the end of the model's forward")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mixed_precision(options: ParallelOptions, *, cast_inputs: bool) -> MixedPrecisionPolicy:
    if options.param_dtype is None:
        return MixedPrecisionPolicy(cast_forward_inputs=cast_inputs)
    param_dtype, reduce_dtype = (getattr(torch, name) for name in (options.param_dtype, options.reduce_dtype))
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=cast_inputs)
