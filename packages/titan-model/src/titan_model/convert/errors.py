"""The error that lists every tensor of a file that does not match a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_SHOWN = 8  # names listed per group: enough to see the pattern, few enough to read


class WeightsError(ValueError):
    """Weights that do not match the model they are loaded into or saved from."""


def check_shapes(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    where: str,
    accepted: Iterable[str] = (),
) -> None:
    """Compare tensor names and shapes with those that a model needs.

    Args:
        found: Shapes by name.
        expected: Shapes by name.
        where: What holds `found`, for the message.
        accepted: Further names that may be present.

    Raises:
        WeightsError: If a tensor is missing, unexpected or has the wrong shape; the message lists all of them, grouped.
    """
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unknown = found.keys() - expected.keys() - set(accepted)
    unexpected = [f"{name} {list(shape)}" for name, shape in found.items() if name in unknown]
    wrong_shape = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and list(found[name]) != list(shape)
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong_shape))
    lines = [_group(title, entries) for title, entries in groups if entries]
    if lines:
        raise WeightsError("\n".join([f"{where}: the weights do not match the model", *lines]))


def _group(title: str, entries: list[str]) -> str:
    more = [f"and {len(entries) - _SHOWN:,} more"] if len(entries) > _SHOWN else []
    return f"  {title} ({len(entries):,}): " + "; ".join(entries[:_SHOWN] + more)
