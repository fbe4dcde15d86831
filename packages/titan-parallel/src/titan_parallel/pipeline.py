"""Pipeline parallelism: the blocks in stages, on ranks that hand the hidden state on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._pytree import tree_leaves, tree_map_only

from titan_parallel.clipping import clip_grad_norm
from titan_parallel.errors import LayoutError
from titan_parallel.mesh import fsdp_mesh
from titan_parallel.options import ParallelOptions, reshard_blocks
from titan_parallel.pipeline_schedule import BuiltSchedule, ScheduledStage
from titan_parallel.pipeline_ties import TiedStages
from titan_parallel.plan import ParallelPlan, Roles, match_names
from titan_parallel.schedules import Stages, check_pipeline, place_stages
from titan_parallel.sequential import LossFunction, Microbatch, loss_context
from titan_parallel.sharding import reshard
from titan_parallel.splitting import split_blocks
from titan_parallel.stages import Boundary, Flow, Like, Stage, check_divisible, cut, enter, stage_plan
from titan_parallel.tensor_parallel import settle_gradients, to_full, whole

LayOut = Callable[[nn.Module, ParallelPlan, Roles], None]


class PipelineRun:
    """Runs the stages of this rank together with those of the other ranks of the pipeline.

    Args:
        stages: Those of this rank, by their place among all stages.
        placed: Where all stages lie.
        mesh: From `build_mesh`.
        options: Schedule; whether blocks are compiled.
        ties: Weights that stages share.
        sharded_logits: Whether the model's logits are left split over the vocabulary.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        placed: Stages,
        mesh: DeviceMesh,
        options: ParallelOptions,
        ties: TiedStages,
        sharded_logits: bool,
    ) -> None:
        self.placed = placed
        self._stages = stages
        self._mesh = mesh
        self._options = options
        self._ties = ties
        self._sharded_logits = sharded_logits
        self._group = mesh["pp"].get_group()
        self._boundaries: dict[Hashable, Boundary] = {}
        self._built: tuple[Hashable, BuiltSchedule] | None = None

    @property
    def parts(self) -> list[nn.Module]:
        """What of the model is on this rank."""
        return [stage.part for stage in self._stages.values()]

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, normaliser: float
    ) -> Tensor:
        """See `ParallelModel`; the loss is on the ranks with the last stage, zero on others."""
        check_pipeline(self._group.size(), self._options.pipeline, microbatches=len(microbatches))

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            return self._loss(output, microbatch, loss_function) / normaliser

        self._ties.begin()
        losses = self._run(microbatches, finish, trains=True)
        settle_gradients(p for stage in self._stages.values() for p in stage.parameters())
        self._ties.add_up()
        return self._sum(losses)

    def evaluate(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> Tensor:
        """See `ParallelModel`; the loss is on the ranks with the last stage, zero on others."""

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            return self._loss(output, microbatch, loss_function)

        return self._sum(self._run(microbatches, finish, trains=False))

    def predict(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See `ParallelModel`."""
        outputs: list[Any] = []

        def finish(output: Any, microbatch: Microbatch) -> Tensor:
            outputs.append(whole(output))
            return torch.zeros(())

        self._run([Microbatch(args, None, kwargs)], finish, trains=False)
        return self._share(outputs[0] if outputs else None, self.placed.ranks[-1])

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """See `ParallelModel`."""
        return clip_grad_norm(parameters, max_norm, stages=self._group, copies=self._ties.counted_elsewhere())

    def _run(
        self, microbatches: Sequence[Microbatch], finish: Callable[[Any, Any], Tensor], *, trains: bool
    ) -> list[Tensor]:
        self._ties.follow()
        boundaries = self._look(microbatches)
        schedule = self._schedule(len(microbatches), boundaries[0], trains)
        for stage in self._stages.values():
            stage.finish = finish
        try:
            with loss_context(self._sharded_logits):
                return schedule.run(microbatches, boundaries)
        except BaseException:
            self._built = None  # left in the middle of a step
            raise
        finally:
            for stage in self._stages.values():
                stage.finish = None

    def _loss(self, output: Any, microbatch: Microbatch, loss_function: LossFunction) -> Tensor:
        loss = loss_function(output if self._sharded_logits else whole(output), microbatch.target)
        return to_full(loss).float()

    def _sum(self, losses: Sequence[Tensor]) -> Tensor:
        zero = torch.zeros((), device=self._device)
        return torch.stack([zero, *(loss.detach() for loss in losses)]).sum()

    def _schedule(self, count: int, boundary: Boundary, trains: bool) -> BuiltSchedule:
        """Return the schedule, built anew if anything changed: stages' buffers are of one shape and one kind of use."""
        key = (count, trains, boundary.local, boundary.hidden.dtype)
        if self._built is None or self._built[0] != key:
            pipeline = self._options.pipeline
            last = len(self.placed.ranks) - 1
            # Half of a compiled block's backward cannot be run alone; what is checkpointed would be computed twice. And
            # the loss, in the last stage, is often a fused function whose backward runs once.
            together = self._options.compile_blocks or self._options.activation_checkpointing != "none"
            stages = [
                ScheduledStage(
                    stage,
                    index,
                    last + 1,
                    self._group,
                    boundary,
                    splits=self.placed.splits_backward and trains,
                    in_one_piece=together or index == last,
                )
                for index, stage in self._stages.items()
            ]
            self._built = key, BuiltSchedule(pipeline.schedule, self.placed, stages, count, trains)
        return self._built[1]

    def _look(self, microbatches: Sequence[Microbatch]) -> list[Boundary]:
        """Return what passes between stages for each microbatch, which the first stage finds out once per shape.

        Raises:
            LayoutError: If more than the hidden state would have to pass.
            ValueError: If microbatches have hidden states of different shapes.
        """
        signatures = [_signature(microbatch) for microbatch in microbatches]
        unknown = {s: m for s, m in zip(signatures, microbatches, strict=True) if s not in self._boundaries}
        looks = list(unknown.items())
        if 0 in self._stages:
            # Ranks that gather weights together have to look together, whether or not they need to.
            looks += [(None, microbatches[0])] * (self._most_looks(len(looks)) - len(looks))
        for signature, microbatch in looks:
            found: Boundary | Exception | None = None
            if 0 in self._stages:
                found = self._try_to_look(microbatch)
            if signature is not None:
                found = self._share_object(found, self.placed.ranks[0])
            if isinstance(found, Exception):
                raise found
            if signature is not None:
                assert found is not None
                self._boundaries[signature] = found
        boundaries = [self._boundaries[signature] for signature in signatures]
        shapes = {str(boundary.hidden) for boundary in boundaries}
        if len(shapes) > 1:
            raise ValueError(
                "the microbatches of one step have to give hidden states of one shape under pipeline parallelism, but "
                f"these give {', '.join(sorted(shapes))}: pad them to equal lengths"
            )
        return boundaries

    def _try_to_look(self, microbatch: Microbatch) -> Boundary | Exception:
        """Return what the first stage finds, or what went wrong, for the other ranks to know."""
        stage = self._stages[0]
        stage.microbatch = microbatch
        modes = [(module, module.training) for module in stage.modules()]
        stage.eval()  # so that nothing is counted, drawn or averaged
        try:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                return stage.look()
        except Exception as error:
            return error
        finally:
            for module, training in modes:
                module.training = training
            reshard(stage)

    def _most_looks(self, own: int) -> int:
        sharing = self._mesh[("dp_shard", "cp", "ep")].size()
        if sharing == 1:
            return own
        most = torch.tensor(own, device=self._device)
        mesh = fsdp_mesh(self._mesh)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group(mesh.ndim - 1))
        return int(most)

    def _share(self, output: Any, rank: int) -> Any:
        """Return what one rank of the pipeline has, on all of them."""
        mine = self._group.rank() == rank
        described = self._share_object(tree_map_only(Tensor, Like.of, output) if mine else None, rank)
        if mine:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        else:
            tensors = []

            def make(like: Like) -> Tensor:
                tensors.append(torch.empty(like.shape, dtype=like.dtype, device=self._device))
                return tensors[-1]

            output = tree_map_only(Like, make, described)
        for tensor in tensors:
            dist.broadcast(tensor.contiguous() if mine else tensor, group=self._group, group_src=rank)
        return output

    def _share_object(self, value: Any, rank: int) -> Any:
        objects = [_picklable(value)]
        dist.broadcast_object_list(objects, group=self._group, group_src=rank)
        return objects[0] if self._group.rank() != rank else value

    @property
    def _device(self) -> torch.device:
        return next(iter(self._stages.values())).flow.device


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
    owned = {
        index: Roles(
            before=roles.before if index == 0 else [],
            blocks=blocks[index],
            after=roles.after if index == len(blocks) - 1 else [],
        )
        for index in mine
    }
    plans = {index: stage_plan(model, plan, roles, own) for index, own in owned.items()}
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    copies = [_copy_structure(model) for _ in mine[1:]]
    stages: dict[int, Stage] = {}
    for (index, own), part in zip(owned.items(), [model, *copies], strict=True):
        flow = Flow(device, mesh["tp"])
        part, within = cut(part, roles, own, flow, tied)
        lay_out(part, {**plans[index], "tied": within}, own)
        enter(part, own, flow)
        stage = Stage(part, flow, own.before, index == len(blocks) - 1)
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


def _signature(microbatch: Microbatch) -> Hashable:
    """Return what the shape of a microbatch's hidden state may depend on."""

    def describe(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), leaf.dtype
        return leaf if isinstance(leaf, int | str) else type(leaf).__qualname__

    keys = tuple(microbatch.kwargs)
    return keys, tuple(describe(leaf) for leaf in tree_leaves((microbatch.args, dict(microbatch.kwargs))))


def _picklable(value: Any) -> Any:
    """Return a value that other ranks can be sent: of an exception, if need be, its text alone."""
    if isinstance(value, Exception):
        with suppress(Exception):
            text = f"{type(value).__name__}: {value}"
            return LayoutError(str(value)) if isinstance(value, LayoutError) else RuntimeError(text)
    return value
