"""Which names of a state to load, and how they compare with what a checkpoint holds.

Called by `loading`: `Selection` answers for each name, `compare` lists all differences before anything is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.index import Content
from titan_ckpt.format.json_values import TUPLE_KEY, key_of, path_of
from titan_ckpt.format.manifest import digest_of
from titan_ckpt.format.safetensors_header import dtype_name, dtype_of
from titan_ckpt.messages import printable

# name -> (dtype, global shape)
Description = dict[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class Selection:
    """The names to load, given by patterns. Names are those of tensors and of values (the path of a value).

    Attributes:
        only: Shell patterns; a name that matches none of them keeps its current value. None selects everything.
        frozen: Shell patterns; a name that matches one of them keeps its current value.
    """

    only: Sequence[str] | None = None
    frozen: Sequence[str] = ()

    @property
    def is_all(self) -> bool:
        """Whether everything is selected."""
        return self.only is None and not self.frozen

    def includes(self, name: str) -> bool:
        """Return whether a name is to be loaded."""
        chosen = self.only is None or any(fnmatchcase(name, pattern) for pattern in self.only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in self.frozen)

    def check_patterns(self, names: Sequence[str]) -> None:
        """Check that each pattern matches something, to catch typos.

        Args:
            names: All names in the state and in the checkpoint.

        Raises:
            CheckpointError: If a pattern matches none of them.
        """
        for pattern in (*(self.only or ()), *self.frozen):
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(sorted(names)[:5])
                raise CheckpointError(f"the pattern {pattern!r} matches no name; names are, for example, {shown}")


@dataclass(frozen=True)
class Comparison:
    """The differences between the selected part of a state and a checkpoint.

    Attributes:
        missing: Names in the state but not in the checkpoint.
        unexpected: Names in the checkpoint, within entries of the state, but not in the state.
        differing: Names with another shape, or with a dtype that cannot be cast; one clause each.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    differing: tuple[str, ...]

    def problem(self, *, strict: bool) -> str:
        """Return everything that prevents loading as one text; empty if nothing does."""
        groups = {
            "missing in the checkpoint": self.missing if strict else (),
            "unexpected, in the checkpoint but not asked for": self.unexpected if strict else (),
            "of another shape or dtype": self.differing,
        }
        if not any(groups.values()):
            return ""
        lines = [
            "the checkpoint does not match the state to load into. Load into the same state that was saved, select a "
            "part of it (only, frozen), allow missing names (strict=False), or allow casts (cast=True)."
        ]
        for title, names in groups.items():
            if names:
                lines += [f"  {title} ({len(names)}):", *(f"    {printable(name)}" for name in names)]
        return "\n".join(lines)


def describe(ranks: Ranks, tensors: Mapping[str, torch.Tensor]) -> list[Description]:
    """Bring the dtypes and shapes that all ranks want to load to rank 0; collective.

    Args:
        ranks: The participating ranks.
        tensors: This rank's tensors by name.

    Returns:
        On rank 0 the distinct descriptions (under FSDP there is one), an empty list elsewhere.
    """
    own = {name: (dtype_name(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
    digests = ranks.all_gather("compare what to load", digest_of(own))
    first_of_its_kind = digests.index(digests[ranks.rank]) == ranks.rank
    gathered = ranks.gather("describe what to load", own if first_of_its_kind else None)
    return [described for described in gathered if described is not None]


def compare(
    entries: Sequence[str], wanted: Sequence[Description], content: Content, selection: Selection, *, cast: bool
) -> Comparison:
    """Compare the selected part of a state with a checkpoint.

    Args:
        entries: The top-level entries of the state.
        wanted: The tensors of the state, as returned by `describe`.
        content: The checkpoint's index.
        selection: Which names count.
        cast: Whether dtypes may differ.

    Returns:
        The differences.
    """
    tensors, includes = content.tensors, selection.includes
    asked = set(entries)
    held = set(content.values) | {path_of(name)[0] for name in tensors}
    absent = {entry for entry in asked - held if includes(f"{entry}/")}
    missing = {f"{entry} (the entire entry)" for entry in absent}
    differing: set[str] = set()
    expected: set[str] = set()
    for description in wanted:
        expected |= description.keys()
        for name, (dtype, shape) in description.items():
            if path_of(name)[0] in absent or not includes(name):
                continue
            if name not in tensors:
                missing.add(name)
                continue
            spec = tensors[name]
            castable = cast and torch.can_cast(spec.dtype, dtype_of(dtype))
            if list(spec.shape) != shape or (dtype_name(spec.dtype) != dtype and not castable):
                found = f"{dtype_name(spec.dtype)} {list(spec.shape)}"
                differing.add(f"{name}: {found} in the checkpoint, {dtype} {shape} asked for")
    within = {name for name in tensors if path_of(name)[0] in asked and includes(name)}
    return Comparison(tuple(sorted(missing)), tuple(sorted(within - expected)), tuple(sorted(differing)))


def overlay(present: Any, stored: Any, entry: str, includes: Callable[[str], bool], *, strict: bool) -> Any:
    """Combine an entry's current values with the stored ones.

    Args:
        present: The entry's current values, encoded.
        stored: The values in the checkpoint, encoded.
        entry: The entry's name.
        includes: Whether a name is taken from the checkpoint.
        strict: Whether a selected value that the checkpoint lacks is dropped; otherwise it keeps its current value.

    Returns:
        The combined values, encoded.
    """
    had, has = dict(_leaves(present, (entry,))), dict(_leaves(stored, (entry,)))
    merged: dict[str, Any] = {}
    for path, value in had.items():
        if not includes(key_of(path)) or (not strict and path not in has):
            _put(merged, path[1:], value)
    for path, value in has.items():
        if includes(key_of(path)):
            _put(merged, path[1:], value)
    return merged


def value_names(values: Mapping[str, Any]) -> list[str]:
    """Return the flat names of all values, formed like those of tensors."""
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
