"""`parallelize`: check the arguments on all ranks, then apply the transforms in the one order in which they work.

Returns a `ParallelModel` (`model`), which runs steps through a `SequentialRun` or a `PipelineRun`.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from titan_parallel.activation_checkpoint import checkpoint_blocks
from titan_parallel.agreement import check_agreement
from titan_parallel.batch_state import check_batch_norms
from titan_parallel.check import check_plan
from titan_parallel.compile import compile_blocks
from titan_parallel.context.attention import replace_attention
from titan_parallel.context.collectives import peers_of
from titan_parallel.context.inputs import SequenceCut, sequence_cut
from titan_parallel.degrees import MESH_DIMS
from titan_parallel.describe import Layout
from titan_parallel.errors import LayoutError
from titan_parallel.expert.experts import check_experts, find_experts, spread_experts
from titan_parallel.float8 import check_float8, convert_linears, is_float8
from titan_parallel.fsdp import apply_fsdp
from titan_parallel.mesh import degrees_of
from titan_parallel.model import ParallelModel
from titan_parallel.options import ParallelOptions
from titan_parallel.pipeline.schedules import check_pipeline
from titan_parallel.plan import (
    ParallelPlan,
    PlannedModel,
    Roles,
    find_roles,
    has_sharded_logits,
    match_names,
    style_names,
)
from titan_parallel.sequential import SequentialRun
from titan_parallel.tensor.styles import apply_tensor_parallel, check_covered
from titan_parallel.tied_weights import check_tied, tie_weights


def parallelize(
    model: nn.Module, mesh: DeviceMesh, plan: ParallelPlan, options: ParallelOptions | None = None
) -> ParallelModel:
    """Lay out a model over a device mesh.

    Transforms are applied in this order: context, float8, tensor and expert parallelism, activation checkpointing,
    compilation, FSDP2; under pipeline parallelism to each stage of this rank. All ranks must call it together.

    Modules with a tensor-parallel style inside a `mixture`, and experts under expert parallelism, become instances of
    new subclasses of their classes: `repr` and `type(module)` change, `isinstance` does not, and they can no longer be
    pickled. Names of parameters do not change.

    Args:
        model: Any module, on meta or with its weights, equal on all ranks. It is changed in place.
        mesh: From `build_mesh`.
        plan: Roles of the model's modules. Entries left out are not applied: without `blocks`, FSDP shards the model as
            one unit.
        options: Dtypes, checkpointing, compilation and so on; the defaults if None.

    Returns:
        The model in its new layout. If it was built on meta, call `materialize` and fill its parameters next.

    Raises:
        LayoutError: If the plan does not fit the model or the layout, or ranks got different arguments.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> mesh = build_mesh(Degrees(dp_shard=-1), "cpu")  # the process group is initialized, here with one rank
        >>> model = parallelize(net, mesh, {"blocks": ["0", "2"]}, ParallelOptions(activation_checkpointing="full"))
        >>> batch = Microbatch(args=(torch.ones(2, 4),), target=torch.zeros(2, 1))
        >>> loss = model.forward_backward([batch], lambda output, target: (output - target).square().sum(), 2)
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    options = options or ParallelOptions()
    _check_untouched(model, mesh)
    check_agreement(_arguments(model, plan, options))
    tied = list(plan.get("tied", ()))
    check_plan(plan, degrees_of(mesh), options=options)
    check_pipeline(mesh["pp"].size(), options.pipeline)
    _check_device(options, mesh.device_type)
    roles = find_roles(model, plan)
    found = match_names(model, [*plan.get("attention", ()), *plan.get("experts", ())])
    check_experts(model, plan, mesh["ep"].size())
    check_batch_norms(model, mesh)
    outer = [*roles.before, *roles.after]
    check_tied(model, tied, {name: name for name in roles.blocks} | dict.fromkeys(outer, "outer"))

    cut = None
    if mesh["cp"].size() > 1:
        cut = _cut_sequences(model, mesh, plan, options)
        names = [name for pattern in plan["attention"] for name in found[pattern]]
        replace_attention(model, names, mesh["cp"].get_group(), options.context)
    if options.float8 is not None:
        convert_linears(model, roles.blocks, plan, mesh["tp"].size(), options.float8)
    styles = style_names(model, plan) if mesh["tp"].size() > 1 else {}
    in_float8 = [name for name, module in model.named_modules() if is_float8(module)]
    layout = Layout(options, roles.blocks, styles, in_float8)

    def lay_out(part: nn.Module, own_plan: ParallelPlan, own_roles: Roles) -> None:
        _lay_out(part, mesh, own_plan, own_roles, options)

    if mesh["pp"].size() > 1:
        from titan_parallel.pipeline.build import make_stages  # importing torch's pipelining takes seconds

        stages = make_stages(PlannedModel(model, plan, roles), mesh, options, lay_out)
        return ParallelModel(stages.parts, mesh, tied, stages, layout=layout, cut=cut)
    lay_out(model, plan, roles)
    sharded_logits = has_sharded_logits(plan, mesh["tp"].size())
    run = SequentialRun(model, sharded_logits=sharded_logits, reduce_every=options.reduce_every_microbatch)
    return ParallelModel([model], mesh, tied, run, layout=layout, cut=cut)


def _check_untouched(model: nn.Module, mesh: DeviceMesh) -> None:
    """Check that the model has not been parallelized before, and that the mesh is from `build_mesh`."""
    if mesh.mesh_dim_names != MESH_DIMS:
        raise LayoutError(f"mesh: has the dims {mesh.mesh_dim_names}, not {MESH_DIMS}; create it with build_mesh")
    if isinstance(model, ParallelModel):
        raise LayoutError("model: is a ParallelModel already; pass the original module")
    if isinstance(model, DistributedDataParallel):
        raise LayoutError(
            "model: is wrapped by DistributedDataParallel; pass its `module` (dp_replicate does the same)"
        )
    laid = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    laid += [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if laid:
        raise LayoutError(
            f"model: {type(model).__name__} is sharded already ({laid[0] or 'the root'}); pass an unsharded model, once"
        )


def _arguments(model: nn.Module, plan: ParallelPlan, options: ParallelOptions) -> dict[str, object]:
    """Return what must be equal on all ranks, each with a name for the message."""
    parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    return {
        **{f"the plan's {entry!r}": value for entry, value in plan.items()},
        **{f"option {field.name}": getattr(options, field.name) for field in fields(options)},
        "the model's class": type(model).__name__,
        "its number of parameters": len(parameters),
        "the parameters' names, shapes, dtypes and requires_grad": parameters,
        "the first element of each parameter": _first_elements(model),
    }


def _first_elements(model: nn.Module) -> list[float]:
    """Return the first element of each parameter that is not on meta: they differ between seeds."""
    firsts = [p.detach().flatten()[:1].cpu().double() for p in model.parameters() if p.numel() and not p.is_meta]
    return torch.cat(firsts).tolist() if firsts else []


def _cut_sequences(model: nn.Module, mesh: DeviceMesh, plan: ParallelPlan, options: ParallelOptions) -> SequenceCut:
    return sequence_cut(
        model,
        plan["sequence"],
        plan.get("positions"),
        peers=peers_of(mesh["cp"].get_group()),
        kind=options.context,
        split_over=mesh["tp"].size() if options.sequence_parallel else 1,
    )


def _lay_out(model: nn.Module, mesh: DeviceMesh, plan: ParallelPlan, roles: Roles, options: ParallelOptions) -> None:
    """Transform a model, or one stage of a model, in place; the order matters."""
    tied, tp, styles = list(plan.get("tied", ())), mesh["tp"].size(), plan.get("tensor", {})
    if tp > 1:
        apply_tensor_parallel(
            model,
            mesh["tp"],
            styles,
            sequence_parallel=options.sequence_parallel,
            kv_heads=plan["heads"][1] if "heads" in plan else None,
        )
        tie_weights(model, tied)
        check_covered(model)
    spread = list(find_experts(model, plan).values()) if mesh["ep"].size() > 1 else []
    for experts in spread:
        spread_experts(experts, mesh)

    checkpoint_blocks(model, roles.blocks, options, plan.get("save", ()), spread)
    if options.compile_blocks:
        compile_blocks(model, roles.blocks, options, spread)

    if mesh.size() > tp * mesh["pp"].size() or options.param_dtype is not None or options.cpu_offload:
        apply_fsdp(model, mesh, roles=roles, tied=bool(tied), experts=spread, options=options)


def _check_device(options: ParallelOptions, device_type: str) -> None:
    if options.async_tp and device_type != "cuda":
        raise LayoutError(
            f"async_tp: requires CUDA (torch's symmetric memory), but the device type is {device_type}; unset it"
        )
    if options.float8 is not None:
        check_float8(options.float8, device_type)
