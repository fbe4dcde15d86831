"""What of a state to load, and how what is asked for compares with what a checkpoint holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.index import TensorSpec
from titan_ckpt.format.json_values import TUPLE_KEY, key_of, parts_of
from titan_ckpt.format.manifest import digest_of
from titan_ckpt.format.safetensors_header import dtype_name, dtype_of

# name -> (dtype, global shape)
Description = dict[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class Selection:
    """Which parts of a state to load, by the names of tensors and of values (a value's name is its path, too).

    Attributes:
        only: shell patterns; what matches none of them keeps its present value. None for everything.
        frozen: shell patterns; what matches one keeps its present value.
    """

    only: Sequence[str] | None = None
    frozen: Sequence[str] = ()

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self.only is None and not self.frozen

    def takes(self, name: str) -> bool:
        """Tell whether a name is to be loaded."""
        chosen = self.only is None or any(fnmatchcase(name, pattern) for pattern in self.only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in self.frozen)

    def refuse_idle_patterns(self, names: Sequence[str]) -> None:
        """See that each pattern means something.

        Args:
            names: all that could be meant, in the state and in the checkpoint.

        Raises:
            CheckpointError: when a pattern matches none of them.
        """
        for pattern in (*(self.only or ()), *self.frozen):
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(sorted(names)[:5])
                raise CheckpointError(f"the pattern {pattern!r} matches no name; names are such as {shown}")


@dataclass(frozen=True)
class Comparison:
    """How what is asked for compares with what there is; of what is selected.

    Attributes:
        missing: asked for, not in the checkpoint.
        unexpected: in the checkpoint, within entries asked for, but not asked for.
        differing: of another shape, or of a type that cannot be cast; one clause each.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    differing: tuple[str, ...]

    def told(self, *, strict: bool) -> str:
        """Return all that stands against loading, in one text; empty when nothing does."""
        groups = {
            "missing in the checkpoint": self.missing if strict else (),
            "unexpected, in the checkpoint but not asked for": self.unexpected if strict else (),
            "of another shape or type": self.differing,
        }
        if not any(groups.values()):
            return ""
        lines = [
            "it does not fit the state to load into. Load into what was saved, or say which part to load (only, "
            "frozen), that names may be missing (strict=False), or that types may be cast (cast=True)."
        ]
        for title, names in groups.items():
            if names:
                lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)]
        return "\n".join(lines)


def describe(ranks: Ranks, tensors: Mapping[str, torch.Tensor]) -> list[Description]:
    """Bring to rank 0 what all ranks want to load; collective.

    Args:
        ranks: who takes part.
        tensors: this rank's tensors by name.

    Returns:
        On rank 0 each description that differs from the others (under FSDP there is but one), an empty list elsewhere.
    """
    own = {name: (dtype_name(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
    digests = ranks.all_gather(digest_of(own))
    first_of_its_kind = digests.index(digests[ranks.rank]) == ranks.rank
    return [told for told in ranks.gather(own if first_of_its_kind else None) if told is not None]


def compare(
    entries: Sequence[str],
    wanted: Sequence[Description],
    values: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    takes: Callable[[str], bool],
    *,
    cast: bool,
) -> Comparison:
    """Compare what is asked for with what a checkpoint holds.

    Args:
        entries: the top-level entries asked for.
        wanted: the tensors asked for, as `describe` returns them.
        values: the checkpoint's values by top-level entry.
        tensors: the checkpoint's tensors.
        takes: tells which names are selected.
        cast: whether another type will do.

    Returns:
        The differences.
    """
    asked = set(entries)
    absent = {entry for entry in asked - set(values) - {parts_of(name)[0] for name in tensors} if takes(f"{entry}/")}
    missing = {f"{entry} (the whole entry)" for entry in absent}
    differing: set[str] = set()
    expected: set[str] = set()
    for description in wanted:
        expected |= description.keys()
        for name, (dtype, shape) in description.items():
            if parts_of(name)[0] in absent or not takes(name):
                continue
            if name not in tensors:
                missing.add(name)
                continue
            spec = tensors[name]
            castable = cast and torch.can_cast(spec.dtype, dtype_of(dtype))
            if list(spec.shape) != shape or (dtype_name(spec.dtype) != dtype and not castable):
                held = f"{dtype_name(spec.dtype)} {list(spec.shape)}"
                differing.add(f"{name}: {held} in the checkpoint, {dtype} {shape} asked for")
    within = {name for name in tensors if parts_of(name)[0] in asked and takes(name)}
    return Comparison(tuple(sorted(missing)), tuple(sorted(within - expected)), tuple(sorted(differing)))


def overlaid(present: Any, stored: Any, entry: str, takes: Callable[[str], bool], *, strict: bool) -> Any:
    """Put together an entry's values from those it has and those that are stored.

    Args:
        present: the entry's present values, encoded.
        stored: those in the checkpoint, encoded.
        entry: its name.
        takes: tells which names come from the checkpoint.
        strict: whether selected values that the checkpoint lacks go, rather than stay.

    Returns:
        The values, encoded.
    """
    had, has = dict(_leaves(present, (entry,))), dict(_leaves(stored, (entry,)))
    merged: dict[str, Any] = {}
    for path, value in had.items():
        if not takes(key_of(path)) or (not strict and path not in has):
            _put(merged, path[1:], value)
    for path, value in has.items():
        if takes(key_of(path)):
            _put(merged, path[1:], value)
    return merged


def value_names(values: Mapping[str, Any]) -> list[str]:
    """Return the names of all values: their paths, joined as tensors' are."""
    return [key_of(path) for entry, value in values.items() for path, _ in _leaves(value, (entry,))]


def _leaves(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value and value.keys() != {TUPLE_KEY}:
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    return [(path, value)] if value != {} or len(path) > 1 else []


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        tree = inner if isinstance(inner, dict) else tree
    tree[path[-1]] = value
