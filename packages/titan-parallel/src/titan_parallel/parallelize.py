"""`parallelize`: the transforms, in the one order in which they work."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel.activation import checkpoint_block
from titan_parallel.mesh import degrees_of
from titan_parallel.model import ParallelModel
from titan_parallel.options import ParallelOptions
from titan_parallel.plan import ParallelPlan, Roles, check_plan, find_roles, match_names
from titan_parallel.schedules import check_pipeline
from titan_parallel.sequential import SequentialRun
from titan_parallel.sharding import apply_fsdp
from titan_parallel.tensor_parallel import apply_tensor_parallel, check_covered
from titan_parallel.tying import check_tied, tie_weights


def parallelize(
    model: nn.Module, mesh: DeviceMesh, plan: ParallelPlan, options: ParallelOptions | None = None
) -> ParallelModel:
    """Lay a model out over a mesh: tensor parallelism, activation checkpointing, compilation, then FSDP2.

    Args:
        model: Any module, on meta or with its weights (then equal on all ranks). It is changed in place.
        mesh: From `build_mesh`.
        plan: Roles of the model's modules. What is left out is not done: without `blocks` FSDP shards the whole
            model as one unit.
        options: Dtypes, checkpointing, compilation; the defaults if None.

    Returns:
        The model in its new layout. If it was built on meta, call `materialize` and fill its parameters next.

    Raises:
        LayoutError: If the plan does not fit the model or the layout.
    """
    options = options or ParallelOptions()
    tied = list(plan.get("tied", ()))
    check_plan(plan, degrees_of(mesh))
    check_pipeline(mesh["pp"].size(), options.pipeline)
    roles = find_roles(model, plan)
    match_names(model, [*plan.get("attention", ()), *plan.get("experts", ())])
    outer = [*roles.before, *roles.after]
    check_tied(model, tied, {name: name for name in roles.blocks} | dict.fromkeys(outer, "outer"))

    sharded_logits = mesh["tp"].size() > 1 and "logits" in plan.get("tensor", {}).values()

    def lay_out(part: nn.Module, own_plan: ParallelPlan, own_roles: Roles) -> None:
        _lay_out(part, mesh, own_plan, own_roles, options)

    if mesh["pp"].size() > 1:
        from titan_parallel.pipeline import make_stages  # torch's pipelining takes seconds to import

        run = make_stages(model, mesh, plan, roles, options, lay_out, sharded_logits)
        return ParallelModel(run.parts, mesh, tied, run)
    lay_out(model, plan, roles)
    return ParallelModel([model], mesh, tied, SequentialRun(model, sharded_logits))


def _lay_out(model: nn.Module, mesh: DeviceMesh, plan: ParallelPlan, roles: Roles, options: ParallelOptions) -> None:
    """Transform a model, or a stage of one, in place; the order is the only one that works."""
    tied = list(plan.get("tied", ()))
    if mesh["tp"].size() > 1:
        apply_tensor_parallel(model, mesh["tp"], plan.get("tensor", {}), sequence_parallel=options.sequence_parallel)
        tie_weights(model, tied)
        check_covered(model)

    for name in roles.blocks:
        block = checkpoint_block(model.get_submodule(name), options.activation_checkpointing)
        model.set_submodule(name, block)
    if options.compile_blocks:
        for name in roles.blocks:
            model.get_submodule(name).compile(backend=options.compile_backend, fullgraph=True)

    if mesh.size() > mesh["tp"].size() * mesh["pp"].size() or options.param_dtype is not None:
        apply_fsdp(model, mesh, roles=roles, tied=bool(tied), options=options)
