"""`parallelize`: the transforms, in the one order in which they work."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel.activation import checkpoint_block
from titan_parallel.model import ParallelModel
from titan_parallel.options import ParallelOptions
from titan_parallel.plan import ParallelPlan, check_plan, match_names
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
    tp = mesh["tp"].size()
    tied = list(plan.get("tied", ()))
    check_plan(plan, tp=tp)
    roles = {"before": plan.get("before", ()), "blocks": plan.get("blocks", ()), "after": plan.get("after", ())}
    found = match_names(model, [pattern for patterns in roles.values() for pattern in patterns])
    names = {role: [name for pattern in patterns for name in found[pattern]] for role, patterns in roles.items()}
    outer = [*names["before"], *names["after"]]
    match_names(model, plan.get("experts", ()))
    check_tied(model, tied, {name: name for name in names["blocks"]} | dict.fromkeys(outer, "outer"))

    if tp > 1:
        apply_tensor_parallel(model, mesh["tp"], plan.get("tensor", {}), sequence_parallel=options.sequence_parallel)
        tie_weights(model, tied)
        check_covered(model)

    for name in names["blocks"]:
        block = checkpoint_block(model.get_submodule(name), options.activation_checkpointing)
        model.set_submodule(name, block)
    before, blocks, after = ([model.get_submodule(name) for name in names[role]] for role in roles)

    if options.compile_blocks:
        for block in blocks:
            block.compile(backend=options.compile_backend, fullgraph=True)

    data_ranks = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    if data_ranks > 1 or options.param_dtype is not None:
        apply_fsdp(model, mesh, before=before, blocks=blocks, after=after, tied=bool(tied), options=options)

    sharded_logits = tp > 1 and "logits" in plan.get("tensor", {}).values()
    return ParallelModel(model, mesh, tied, sharded_logits)
