"""Tied weights: one parameter that several modules hold.

`parallelize` checks the plan's `tied` against the model, and ties again after a transform replaced parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from titan_parallel.errors import LayoutError


def check_tied(model: nn.Module, tied: Sequence[tuple[str, str]], units: Mapping[str, str]) -> None:
    """Check that the plan's tied weights are exactly those that the model shares.

    Sharding would make two of a shared weight that is not in the plan; a weight tied only by the plan would be missing
    from the state dict. Neither would raise an error later.

    Args:
        model: The model, before any transform.
        tied: Pairs (alias, owner) of the plan.
        units: Module names to the name of the FSDP unit that they are in; other modules are in the root unit.

    Raises:
        LayoutError: If they differ; the message names every weight.
    """
    holders: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(key)
    together = {name: names for names in holders.values() for name in names}
    wrong: list[str] = []
    for alias, owner in tied:
        if owner not in together.get(alias, ()):
            wrong.append(f"{alias!r} and {owner!r} are tied in the plan, but are not one parameter of the model")
        elif _unit(alias, units) != _unit(owner, units):
            wrong.append(f"{alias!r} and {owner!r} are one parameter, but in different FSDP units")
    aliases = {alias for alias, _ in tied}
    for names in holders.values():
        owner, *others = [name for name in names if name not in aliases] or names
        wrong += [
            f"{(other, owner)} is one parameter of the model, but not in plan['tied']; add it" for other in others
        ]
    if wrong:
        raise LayoutError(f"tied weights of {type(model).__name__}: {'; '.join(wrong)}")


def tie_weights(model: nn.Module, tied: Sequence[tuple[str, str]]) -> None:
    """Make each alias the same parameter object as its owner again, after a transform replaced one of them."""
    for alias, owner in tied:
        module, _, key = alias.rpartition(".")
        model.get_submodule(module).register_parameter(key, model.get_parameter(owner))


def _unit(parameter: str, units: Mapping[str, str]) -> str:
    return next((unit for module, unit in units.items() if parameter.startswith(f"{module}.")), "")
