"""Building a pipeline: cut the model into stages and lay out the stages of this rank.

`parallelize` calls `make_stages` instead of laying out the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from titan_parallel.errors import LayoutError
from titan_parallel.mesh import fsdp_mesh
from titan_parallel.options import ParallelOptions, reshard_blocks
from titan_parallel.pipeline.balance import split_blocks
from titan_parallel.pipeline.partition import check_divisible, cut, enter, own_roles, stage_plan
from titan_parallel.pipeline.run import PipelineRun
from titan_parallel.pipeline.schedule_csv import check_order
from titan_parallel.pipeline.schedules import StagePlacement, check_pipeline, place_stages
from titan_parallel.pipeline.stage import Stage
from titan_parallel.pipeline.stage_modules import Flow
from titan_parallel.pipeline.tied_weights import TiedStages
from titan_parallel.plan import ParallelPlan, PlannedModel, Roles, has_sharded_logits, match_names

LayOut = Callable[[nn.Module, ParallelPlan, Roles], None]


def make_stages(planned: PlannedModel, mesh: DeviceMesh, options: ParallelOptions, lay_out: LayOut) -> PipelineRun:
    """Cut a model into stages and lay out those of this rank.

    Args:
        planned: The model, changed in place, with its plan and roles.
        mesh: From `build_mesh`.
        options: Schedule, split points and the other options.
        lay_out: Transforms one stage in place, given its own plan and roles.

    Returns:
        The object that runs the stages.

    Raises:
        LayoutError: If the model cannot be cut this way.
    """
    model, plan, roles = planned.module, planned.plan, planned.roles
    pp, rank = mesh["pp"].size(), mesh["pp"].get_local_rank()
    placement = _placement(planned, options, pp)
    blocks = split_blocks(model, roles, len(placement.ranks), options.pipeline)
    tied = list(plan.get("tied", ()))
    if mesh["tp"].size() > 1:
        _check_ties(model, plan, tied)
    mine = placement.of(rank)
    owned = {index: own_roles(model, roles, blocks, index) for index in mine}
    plans = {index: stage_plan(planned, own) for index, own in owned.items()}
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    copies = [_copy_structure(model) for _ in mine[1:]]
    stages: dict[int, Stage] = {}
    for (index, own), part in zip(owned.items(), [model, *copies], strict=True):
        flow = Flow(device, mesh["tp"])
        part, within = cut(part, roles, own, flow, tied)
        lay_out(part, {**plans[index], "tied": within}, own)
        is_last = index == len(blocks) - 1
        enter(part, own, flow, is_last=is_last)
        stage = Stage(part, flow, own.before, is_last=is_last)
        if any(isinstance(module, FSDPModule) for module in part.modules()):
            # torch's schedules check whether the root is an FSDP module; here it has no parameters of its own.
            fully_shard(stage, mesh=fsdp_mesh(mesh), reshard_after_forward=False)
        stages[index] = stage
    ties = _ties([stage.part for stage in stages.values()], planned, placement, mesh)
    sharded_logits = has_sharded_logits(plan, mesh["tp"].size())
    return PipelineRun(stages, placement, mesh, options, ties, sharded_logits=sharded_logits)


def _placement(planned: PlannedModel, options: ParallelOptions, pp: int) -> StagePlacement:
    """Check model and options for pipeline parallelism, and return which stages are on which rank."""
    check_divisible(planned.module, planned.roles)
    check_pipeline(pp, options.pipeline, blocks=planned.roles.blocks)
    placement = place_stages(options.pipeline, pp)
    if placement.file is not None:
        check_order(placement.file)
    if reshard_blocks(options, pp) is not False and placement.splits_backward:
        raise LayoutError(
            f"pipeline schedule {options.pipeline.schedule} computes gradients of weights long after those of inputs, "
            "so weights must stay gathered; set reshard_after_forward to 'default' or 'never', or use 1F1B"
        )
    return placement


def _copy_structure(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules that shares its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _ties(parts: Sequence[nn.Module], planned: PlannedModel, placement: StagePlacement, mesh: DeviceMesh) -> TiedStages:
    """Find the weights that are tied across stages, and the ranks of their copies."""
    rank, first, last = mesh["pp"].get_local_rank(), placement.ranks[0], placement.ranks[-1]
    here: list[tuple[str, str]] = []
    away: dict[str, int] = {}
    copies: set[str] = set()
    for alias, owner in planned.plan.get("tied", ()):
        outer = {name: any(name.startswith(f"{module}.") for module in planned.roles.before) for name in (alias, owner)}
        if outer[alias] == outer[owner]:
            continue  # both in one stage
        before, after = (alias, owner) if outer[alias] else (owner, alias)
        if first == last:
            here += [(before, after)] if rank == first else []
            continue
        if rank in (first, last):
            mine = before if rank == first else after
            away[mine] = last if rank == first else first
            if mine == alias:
                copies.add(mine)
    return TiedStages(parts, here, away, frozenset(copies), mesh["pp"].get_group())


def _check_ties(model: nn.Module, plan: ParallelPlan, tied: Sequence[tuple[str, str]]) -> None:
    """Check that tensor parallelism splits both copies of a tied weight along the same dim."""
    patterns = plan.get("tensor", {})
    found = match_names(model, patterns, parameters=True)
    dims = {"vocab": 0, "colwise": 0, "logits": 0, "rowwise": 1}
    split = {name: dims.get(style) for pattern, style in patterns.items() for name in found[pattern]}
    for pair in tied:
        alias, owner = (split.get(name, split.get(name.rpartition(".")[0])) for name in pair)
        if alias != owner:
            raise LayoutError(
                f"plan['tied']: {pair[0]} and {pair[1]} have tensor-parallel styles that split them along different "
                "dims; pipeline stages can only share weights that are split alike"
            )
