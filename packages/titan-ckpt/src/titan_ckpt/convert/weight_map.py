"""Weight maps: how names and shapes of one side become those of the other, rule by rule.

Internal names are those of the training code, external names those of another program, e.g. Hugging Face's. A map is
provided by the caller, who knows both models; this module declares its protocol and reads a source through it
(`Mapped`). The shapes on the other side are computed by running the rules on meta tensors, which have no data, so that
all mistakes are reported before anything is read.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from titan_ckpt.convert.source import AnySpec, FullTensorSource, Spec, TensorSource
from titan_ckpt.errors import CheckpointError
from titan_ckpt.messages import printable

Direction = Literal["to_external", "to_internal"]


class TensorRule(Protocol):
    """A few tensors of one side that become a few of the other, e.g. q, k and v that become one and back.

    The two functions use torch operations that also run on the meta device, leave their inputs unchanged, and return
    exactly the announced names. A rule that only renames returns the very tensor it was given: then a sharded load
    reads no more than its shard.
    """

    @property
    def internal(self) -> Sequence[str]:
        """The names in the training code."""
        ...

    @property
    def external(self) -> Sequence[str]:
        """The names on the other side, e.g. Hugging Face's."""
        ...

    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Convert the internal tensors to the external ones."""
        ...

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Convert the external tensors to the internal ones."""
        ...


class WeightMap(Protocol):
    """The rules for one model, and the config that the other side needs.

    What a map means is the same for everything that reads or writes weights through it:

    - Every rule is run. One without external names has a check only, that what it is given need not be stored: its
      `to_external` raises if that is wrong, before anything is written. In the other direction it makes its tensors.
    - Each tensor must be in a rule, under its own name; what is missing and what is unexpected is refused.
    - Tied weights are one rule with all internal names and one external name: `to_external` uses one of them,
      `to_internal` returns the same tensor under all names.
    - A map may also have `aliases`, a mapping of external names to the external names that they are copies of. A file
      may hold a tied weight under either name, or under both; then the two are compared, and refused if they differ.
      Aliases are not written.
    - A map may also have `ignored`, regular expressions of external names that files may hold in addition. They must
      match the full name; what they match is not read.
    - An exporter of a run refuses a map with tensors that may become impossible to store (rules without external
      names) when it is made, not when the first checkpoint is exported.
    """

    @property
    def rules(self) -> Sequence[TensorRule]:
        """The rules, in the order in which the tensors are to be written."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of `config.json`."""
        ...


class Mapped(FullTensorSource):
    """A source seen through the rules of a weight map; see `through` for a whole map.

    A rule's tensors are made when the first is read, and each is dropped once it is returned: read in the order of
    `tensors`, memory holds the tensors of one rule at a time.
    """

    def __init__(self, source: TensorSource, rules: Sequence[TensorRule], direction: Direction) -> None:
        """Compute the names, dtypes and shapes of the other side; nothing is read.

        Args:
            source: The underlying source; each of its tensors must be used by a rule (see `Exclude`).
            rules: The map's rules.
            direction: "to_external" if the source holds internal tensors, "to_internal" if it holds external ones.

        Raises:
            CheckpointError: If the rules do not match the source, all of it in one message, or one another.
        """
        self._source, self._direction = source, direction
        self.values = source.values
        inputs = [inputs_of(rule, direction) for rule in rules]
        outputs = [outputs_of(rule, direction) for rule in rules]
        wanted = {name for names in inputs for name in names}
        raise_mismatches(
            "the weight map does not match the tensors",
            {
                "missing, needed by the map": wanted - source.tensors.keys(),
                "unexpected, not in the map": source.tensors.keys() - wanted,
            },
        )
        twice = [name for name, count in Counter(name for names in outputs for name in names).items() if count > 1]
        if twice:
            raise CheckpointError(f"the weight map makes {', '.join(sorted(twice))} more than once")
        self._rule_of = {name: rule for rule, names in zip(rules, outputs, strict=True) for name in names}
        self._checks = [rule for rule, names in zip(rules, outputs, strict=True) if not names]
        self._made: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, AnySpec] = {}
        for rule in rules:
            self.tensors.update(probe(rule, direction, source.tensors))

    def read(self, name: str) -> torch.Tensor:
        """Read the inputs of a tensor's rule and make the tensor; the rule's other tensors are kept for later reads."""
        while self._checks:  # before the first tensor is handed out
            self._run(self._checks[-1])
            self._checks.pop()
        if name not in self._made:
            self._made = self._run(self._rule_of[name])
        tensor, spec = self._made.pop(name), self.tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise CheckpointError(
                f"the weight map returned {name} as {_shown(tensor)}, but on the meta device as {spec.dtype} "
                f"{list(spec.shape)}"
            )
        return tensor

    def _run(self, rule: TensorRule) -> dict[str, torch.Tensor]:
        given = {wanted: self._source.read(wanted) for wanted in inputs_of(rule, self._direction)}
        return apply(rule, self._direction, given)


class External:
    """A source of external tensors under the names that a map's rules have: without aliases and ignored names."""

    def __init__(self, source: TensorSource, weight_map: WeightMap) -> None:
        """Create the view; nothing is read.

        Args:
            source: The underlying source.
            weight_map: The map, whose `aliases` and `ignored` are applied.
        """
        self._source, self.values = source, source.values
        aliases: Mapping[str, str] = getattr(weight_map, "aliases", {})
        ignored: Sequence[str] = getattr(weight_map, "ignored", ())
        self._stored = {
            name: name
            for name in source.tensors
            if name not in aliases and not any(re.fullmatch(pattern, name) for pattern in ignored)
        }
        self._copies: list[tuple[str, str]] = []
        for alias, owner in aliases.items():
            if alias in source.tensors and self._stored.setdefault(owner, alias) != alias:
                self._copies.append((alias, owner))
        self.tensors = {name: source.tensors[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        return self._source.read(self._stored[name])

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor."""
        return self._source.read_slice(self._stored[name], offsets, sizes)

    def check_copies(self, names: Collection[str]) -> None:
        """Compare tied weights that the source holds twice.

        Args:
            names: The tensors that are going to be read.

        Raises:
            CheckpointError: If two copies of one differ.
        """
        for alias, owner in self._copies:
            if owner in names and not _equal(self._source.read(alias), self._source.read(self._stored[owner])):
                raise CheckpointError(
                    f"the weight map ties {alias} to {owner}, but they differ in the file: untie them in the model, or "
                    "remove the wrong tensor"
                )


def through(source: TensorSource, weight_map: WeightMap, direction: Direction) -> TensorSource:
    """Return a source seen through a weight map; see `WeightMap` for what that means.

    Args:
        source: The underlying source.
        weight_map: The map.
        direction: "to_external" if the source holds internal tensors, "to_internal" if it holds external ones.

    Raises:
        CheckpointError: If the map does not match the source, or copies of a tied weight differ.
    """
    if direction == "to_external":
        return Mapped(source, weight_map.rules, direction)
    external = External(source, weight_map)
    mapped = Mapped(external, weight_map.rules, direction)
    external.check_copies(external.tensors.keys())
    return mapped


def check_expressible(weight_map: WeightMap) -> None:
    """Check that whatever values a run gives its weights, the other side has a place for them.

    Raises:
        CheckpointError: If a rule has no external names: the export would fail as soon as its tensors change.
    """
    without = [name for rule in weight_map.rules if not rule.external for name in rule.internal]
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise CheckpointError(
            f"the export's format has no place for {without[0]}{more}: exporting a run's checkpoints would fail once "
            "training changes it. Train a model without it, or do not export"
        )


def inputs_of(rule: TensorRule, direction: Direction) -> Sequence[str]:
    """Return the names that a rule reads."""
    return rule.internal if direction == "to_external" else rule.external


def outputs_of(rule: TensorRule, direction: Direction) -> Sequence[str]:
    """Return the names that a rule makes."""
    return rule.external if direction == "to_external" else rule.internal


def apply(rule: TensorRule, direction: Direction, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run one rule.

    Args:
        rule: The rule.
        direction: Which of its functions to run.
        given: Its inputs by name.

    Returns:
        Its outputs by name, exactly those that it announces.

    Raises:
        CheckpointError: If the function fails or returns anything else.
    """
    try:
        made = rule.to_external(given) if direction == "to_external" else rule.to_internal(given)
    except Exception as error:  # user code: whatever it raises becomes one message
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
        raise CheckpointError(f"the weight map's rule for {shapes} failed: {type(error).__name__}: {error}") from error
    announced = outputs_of(rule, direction)
    if not isinstance(made, Mapping) or set(made) != set(announced):
        found = list(made) if isinstance(made, Mapping) else type(made).__name__
        raise CheckpointError(f"the weight map's rule for {', '.join(announced)} returned {found} instead")
    return dict(made)


def probe(rule: TensorRule, direction: Direction, specs: Mapping[str, AnySpec]) -> dict[str, AnySpec]:
    """Compute the dtypes and shapes that a rule makes, without data.

    Args:
        rule: The rule.
        direction: Which of its functions to run.
        specs: Metadata of its inputs, and possibly of other tensors.

    Returns:
        Metadata of its outputs, in the rule's order.
    """
    made = apply(rule, direction, _meta_tensors(inputs_of(rule, direction), specs))
    return {name: Spec(made[name].dtype, tuple(made[name].shape)) for name in outputs_of(rule, direction)}


def renames(rule: TensorRule, direction: Direction, specs: Mapping[str, AnySpec]) -> bool:
    """Return whether a rule does nothing but give one tensor other names."""
    names = inputs_of(rule, direction)
    if len(names) != 1:
        return False
    given = _meta_tensors(names, specs)
    return all(tensor is given[names[0]] for tensor in apply(rule, direction, given).values())


def raise_mismatches(what: str, groups: Mapping[str, Iterator[str] | set[str]]) -> None:
    """Raise one error that lists all mismatches, by kind.

    Args:
        what: The first line.
        groups: For each kind of mismatch, the lines to show.

    Raises:
        CheckpointError: Unless all groups are empty.
    """
    lines = []
    for title, listed in groups.items():
        if listed:
            lines += [f"  {title} ({len(set(listed))}):", *(f"    {printable(line)}" for line in sorted(listed))]
    if lines:
        raise CheckpointError("\n".join([f"{what}:", *lines]))


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _meta_tensors(names: Sequence[str], specs: Mapping[str, AnySpec]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(specs[name].shape, dtype=specs[name].dtype, device="meta") for name in names}


def _shown(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
