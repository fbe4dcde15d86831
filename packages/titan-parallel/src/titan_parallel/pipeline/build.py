"""Building a pipeline: the model cut into stages, those of this rank laid out."""

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
from titan_parallel.pipeline.schedules import Stages, check_pipeline, place_stages
from titan_parallel.pipeline.stage import Stage
from titan_parallel.pipeline.stage_modules import Flow
from titan_parallel.pipeline.tied_weights import TiedStages
from titan_parallel.plan import ParallelPlan, Roles, match_names

LayOut = Callable[[nn.Module, ParallelPlan, Roles], None]


def make_stages(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: ParallelPlan,
    roles: Roles,
    options: ParallelOptions,
    lay_out: LayOut,
    sharded_logits: bool,
) -> PipelineRun:
    """Cut a model into stages and lay out those of this rank.

    Args:
        model: The whole model; changed in place.
        mesh: From `build_mesh`.
        plan: The model's plan.
        roles: Its modules.
        options: Schedule, split points and the rest.
        lay_out: Transforms one stage in place, by a plan and roles of its own.
        sharded_logits: Whether its logits are left split over the vocabulary.

    Returns:
        What runs them.

    Raises:
        LayoutError: If the model cannot be cut so.
    """
    pp, rank = mesh["pp"].size(), mesh["pp"].get_local_rank()
    check_divisible(model, roles)
    check_pipeline(pp, options.pipeline, blocks=roles.blocks)
    placed = place_stages(options.pipeline, pp)
    if reshard_blocks(options, pp) is not False and placed.splits_backward:
        raise LayoutError(
            f"pipeline schedule {options.pipeline.schedule} computes gradients of weights long after those of inputs, "
            "so gathered weights have to stay: leave reshard_after_forward at 'default' or 'never', or take 1F1B"
        )
    blocks = split_blocks(model, roles, len(placed.ranks), options.pipeline)
    tied = list(plan.get("tied", ()))
    if mesh["tp"].size() > 1:
        _check_ties(model, plan, tied)
    mine = placed.of(rank)
    owned = {index: own_roles(model, roles, blocks, index) for index in mine}
    plans = {index: stage_plan(model, plan, roles, own) for index, own in owned.items()}
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    copies = [_copy_structure(model) for _ in mine[1:]]
    stages: dict[int, Stage] = {}
    for (index, own), part in zip(owned.items(), [model, *copies], strict=True):
        flow = Flow(device, mesh["tp"])
        part, within = cut(part, roles, own, flow, tied)
        lay_out(part, {**plans[index], "tied": within}, own)
        is_last = index == len(blocks) - 1
        enter(part, own, flow, is_last=is_last)
        stage = Stage(part, flow, own.before, is_last)
        if any(isinstance(module, FSDPModule) for module in part.modules()):
            # torch's schedules look for FSDP at the root; which owns no parameter here.
            fully_shard(stage, mesh=fsdp_mesh(mesh), reshard_after_forward=False)
        stages[index] = stage
    ties = _ties([stage.part for stage in stages.values()], tied, roles, placed, rank, mesh)
    return PipelineRun(stages, placed, mesh, options, ties, sharded_logits)


def _copy_structure(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules that share its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _ties(
    parts: Sequence[nn.Module],
    tied: Sequence[tuple[str, str]],
    roles: Roles,
    placed: Stages,
    rank: int,
    mesh: DeviceMesh,
) -> TiedStages:
    """Sort out which weights are tied across stages, and where their copies are."""
    first, last = placed.ranks[0], placed.ranks[-1]
    here: list[tuple[str, str]] = []
    away: dict[str, int] = {}
    copies: set[str] = set()
    for alias, owner in tied:
        outer = {name: any(name.startswith(f"{module}.") for module in roles.before) for name in (alias, owner)}
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
    """Check that tensor parallelism splits both copies of a tied weight alike."""
    patterns = plan.get("tensor", {})
    found = match_names(model, patterns, parameters=True)
    dims = {"vocab": 0, "colwise": 0, "logits": 0, "rowwise": 1}
    split = {name: dims.get(style) for pattern, style in patterns.items() for name in found[pattern]}
    for pair in tied:
        alias, owner = (split.get(name, split.get(name.rpartition(".")[0])) for name in pair)
        if alias != owner:
            raise LayoutError(
                f"the plan ties {pair[0]} and {pair[1]}, but tensor parallelism splits them along different dims; "
                "stages of a pipeline can only share what they split alike"
            )
