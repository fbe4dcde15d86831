"""One error for all the tensors of a file that do not fit a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_SHOWN = 8  # names of each group: enough to see the pattern, few enough to read


class WeightsError(ValueError):
    """Weights do not fit the model that they are for."""


def check_shapes(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    where: str,
    accepted: Iterable[str] = (),
) -> None:
    """Hold names and shapes against those that a model needs.

    Args:
        found: Shapes by name.
        expected: Shapes by name.
        where: What holds `found`, for the message.
        accepted: Names that may be there besides.

    Raises:
        WeightsError: If anything is missing, unexpected or of another shape; the message lists all of it in groups.
    """
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    beyond = found.keys() - expected.keys() - set(accepted)
    unexpected = [f"{name} {list(shape)}" for name, shape in found.items() if name in beyond]
    misshaped = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and list(found[name]) != list(shape)
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
    lines = [_group(title, entries) for title, entries in groups if entries]
    if lines:
        raise WeightsError("\n".join([f"the weights in {where} do not fit the model", *lines]))


def _group(title: str, entries: list[str]) -> str:
    more = [f"and {len(entries) - _SHOWN:,} more"] if len(entries) > _SHOWN else []
    return f"  {title} ({len(entries):,}): " + "; ".join(entries[:_SHOWN] + more)
