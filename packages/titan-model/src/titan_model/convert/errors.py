"""The error that lists every tensor of a file that does not match a model."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_SHOWN = 8  # names listed per group: enough to see the pattern, few enough to read

# Parts of names that wrappers of modules add, at any place.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")


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
            If most names differ by one prefix, the message says so, and lists what would not match without it.
    """
    accepted = set(accepted)
    if renamed := _renamed(found, expected, accepted):
        known = expected.keys() | accepted
        found = {name if name in known else renamed.to_expected(name): shape for name, shape in found.items()}
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unknown = found.keys() - expected.keys() - accepted
    unexpected = [f"{name} {list(shape)}" for name, shape in found.items() if name in unknown]
    wrong_shape = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and list(found[name]) != list(shape)
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong_shape))
    lines = [_group(title, entries) for title, entries in groups if entries]
    if renamed:
        also = "; besides, the weights do not match the model" if lines else ""
        raise WeightsError("\n".join([f"{where}: {renamed.sentence()}{also}", *lines]))
    if lines:
        raise WeightsError("\n".join([f"{where}: the weights do not match the model", *lines]))


class _Renamed(NamedTuple):
    """How the names of most tensors differ from those that are needed.

    Attributes:
        actual: Prefix that they have; the part that they contain, if `anywhere`.
        needed: Prefix that they should have instead.
        anywhere: Whether `actual` may be at any place in a name, and at several.
    """

    actual: str
    needed: str
    anywhere: bool = False

    def to_expected(self, name: str) -> str:
        """Return the name that is needed."""
        if self.anywhere:
            return name.replace(self.actual, "")
        return self.needed + name.removeprefix(self.actual) if name.startswith(self.actual) else name

    def sentence(self) -> str:
        """Return what is wrong and what to do."""
        if self.anywhere:
            return f"the names contain {self.actual!r}, which a wrapper added: remove it from the names"
        if not self.actual:
            return f"the names lack the prefix {self.needed!r}: add it to the names"
        if not self.needed:
            return f"the names have the additional prefix {self.actual!r}: remove it from the names"
        return f"the names have the prefix {self.actual!r} in place of {self.needed!r}: replace it"


def _renamed(found: Iterable[str], expected: Iterable[str], accepted: set[str]) -> _Renamed | None:
    """Return the prefix by which the names of most missing tensors differ from those found, or None."""
    held, needed = set(found), set(expected)
    missing, unexpected = needed - held, held - needed - accepted
    if not missing or not unexpected:
        return None

    def explains(change: _Renamed) -> bool:
        reached = {change.to_expected(name) for name in unexpected} & missing
        return len(reached) > max(1, len(missing) // 2)

    # The name with the most parts can be confused with the fewest others.
    parts = max(sorted(missing), key=lambda name: name.count(".")).split(".")
    prefixes = [
        _Renamed(name.removesuffix(rest), "".join(f"{part}." for part in parts[:cut]))
        for cut in range(len(parts))
        for rest in [".".join(parts[cut:])]
        for name in sorted(unexpected)
        if name == rest or name.endswith(f".{rest}")
    ]
    additional = [change for change in prefixes if not change.needed]
    wrapped = [_Renamed(wrapper, "", anywhere=True) for wrapper in _WRAPPERS]
    return next((change for change in (*additional, *wrapped, *prefixes) if explains(change)), None)


def shown(value: object) -> str:
    """Return a value for a message, shortened if it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    short.maxdict, short.maxlist = 3, 4
    return short.repr(value)


def _group(title: str, entries: list[str]) -> str:
    more = [f"and {len(entries) - _SHOWN:,} more"] if len(entries) > _SHOWN else []
    return f"  {title} ({len(entries):,}): " + "; ".join(entries[:_SHOWN] + more)
