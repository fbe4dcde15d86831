"""Cutting a model into pipeline stages: modules of other stages are replaced by those of `stage_modules`.

Called by `build.make_stages`, in this order: `check_divisible`, `own_roles`, `stage_plan`, `cut`, and `enter` after all
transforms.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from titan_parallel.errors import LayoutError
from titan_parallel.pipeline.stage_modules import End, Entrance, Exit, Flow, PassOn, StandIn
from titan_parallel.plan import ParallelPlan, PlannedModel, Roles, match_names


def cut(
    model: nn.Module, roles: Roles, own: Roles, flow: Flow, tied: Sequence[tuple[str, str]]
) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Replace the modules of a model that belong to other stages, in place.

    Args:
        model: The model, or a copy of it.
        roles: All modules that are distributed over stages.
        own: The modules of this stage.
        flow: State that the stage's modules will share.
        tied: Pairs of tied parameters.

    Returns:
        The model, and the pairs of which both are in this stage.
    """
    first, last = (roles.blocks.index(name) for name in (own.blocks[0], own.blocks[-1]))
    for names, kept, kind in (
        (roles.before, own.before, StandIn),
        (roles.blocks[:first], [], PassOn),
        (roles.blocks[last + 1 :], [], Exit),
        (roles.after, own.after, Exit),
    ):
        for name in names:
            if name not in kept:
                model.set_submodule(name, kind(name, model.get_submodule(name), flow))
    here = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return model, [pair for pair in tied if here.issuperset(pair)]


def enter(model: nn.Module, own: Roles, flow: Flow, *, is_last: bool) -> None:
    """Wrap a stage's first block in `Entrance` and the model's last block in `End`, after all transforms."""
    name = own.blocks[0]
    model.set_submodule(name, Entrance(model.get_submodule(name), flow))
    if is_last:
        name = own.blocks[-1]
        model.set_submodule(name, End(model.get_submodule(name), flow))


def check_divisible(model: nn.Module, roles: Roles) -> None:
    """Check that every parameter belongs to a module of one of the roles, under one name.

    Raises:
        LayoutError: If not; the message names the parameters or modules.
    """
    prefixes = tuple(f"{name}." for name in [*roles.before, *roles.blocks, *roles.after])
    stray = [name for name, _ in model.named_parameters() if not name.startswith(prefixes)]
    if not roles.blocks:
        raise LayoutError(
            "pp above 1 requires plan['blocks'], which stages are made of, but it is empty; add it or set pp=1"
        )
    shared = _shared(model, prefixes)
    if shared:
        raise LayoutError(
            f"pp above 1: the model uses one module under two names, which stages cannot share: {shared[0]}; make them "
            "separate modules or set pp=1"
        )
    if stray:
        raise LayoutError(
            "pp above 1: these parameters are in no module of plan['before'], plan['blocks'] or plan['after'], so no "
            f"stage owns them: {', '.join(stray)}"
        )


def _shared(model: nn.Module, prefixes: tuple[str, ...]) -> list[str]:
    """Return the modules with parameters that are in two units (modules distributed over stages) under two names."""

    def unit(name: str) -> str:
        return next((prefix for prefix in prefixes if f"{name}.".startswith(prefix)), "")

    first: dict[int, str] = {}
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        other = first.setdefault(id(module), name)
        if unit(other) != unit(name) and any(True for _ in module.parameters()):
            found.append(f"{name} is {other}")
    return found


def stage_plan(planned: PlannedModel, own: Roles) -> ParallelPlan:
    """Return the plan of one stage: names instead of patterns, without modules of other stages.

    Args:
        planned: The model before it is cut.
        own: The modules of the stage.
    """
    model, plan, roles = planned.module, planned.plan, planned.roles
    kept = {*own.before, *own.blocks, *own.after}
    absent = [name for name in [*roles.before, *roles.blocks, *roles.after] if name not in kept]
    prefixes = tuple(f"{name}." for name in absent)

    def here(patterns: Sequence[str]) -> list[str]:
        found = match_names(model, patterns, parameters=True)
        return [
            name
            for pattern in patterns
            for name in found[pattern]
            if name not in absent and not name.startswith(prefixes)
        ]

    styles = plan.get("tensor", {})
    return {
        **plan,
        "before": own.before,
        "blocks": own.blocks,
        "after": own.after,
        "tensor": {name: style for pattern, style in styles.items() for name in here([pattern])},
        "attention": here(plan.get("attention", ())),
        "experts": here(plan.get("experts", ())),
    }


def own_roles(model: nn.Module, roles: Roles, blocks: Sequence[Sequence[str]], index: int) -> Roles:
    """Return the modules of one stage.

    Args:
        model: The model.
        roles: Its modules.
        blocks: Names of the blocks of each stage.
        index: The stage. Modules before the blocks that have no state, such as rotary tables, are in every stage.
    """
    return Roles(
        before=[name for name in roles.before if index == 0 or not model.get_submodule(name).state_dict()],
        blocks=list(blocks[index]),
        after=roles.after if index == len(blocks) - 1 else [],
    )
