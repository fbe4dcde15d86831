"""Weight maps: how names and shapes of one side become those of the other, rule by rule.

Internal names are those of the training code, external names those of another program, e.g. Hugging Face's. A map is
provided by the caller, who knows both models; this module declares its protocol and reads a source through it
(`Mapped`). The shapes on the other side are computed by running the rules on meta tensors, which have no data, so that
all mistakes are reported before anything is read.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from titan_ckpt.convert.source import AnySpec, FullTensorSource, Spec, TensorSource
from titan_ckpt.errors import CheckpointError

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

    Tied weights are one rule with all internal names and one external name: `to_external` uses one of them,
    `to_internal` returns the same tensor under all names.
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
    """A source seen through a weight map.

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
        self._made: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, AnySpec] = {}
        for rule in rules:
            self.tensors.update(probe(rule, direction, source.tensors))

    def read(self, name: str) -> torch.Tensor:
        """Read the inputs of a tensor's rule and make the tensor; the rule's other tensors are kept for later reads."""
        if name not in self._made:
            rule = self._rule_of[name]
            given = {wanted: self._source.read(wanted) for wanted in inputs_of(rule, self._direction)}
            self._made = apply(rule, self._direction, given)
        tensor, spec = self._made.pop(name), self.tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise CheckpointError(
                f"the weight map returned {name} as {_shown(tensor)}, but on the meta device as {spec.dtype} "
                f"{list(spec.shape)}"
            )
        return tensor


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
            lines += [f"  {title} ({len(set(listed))}):", *(f"    {line}" for line in sorted(listed))]
    if lines:
        raise CheckpointError("\n".join([f"{what}:", *lines]))


def _meta_tensors(names: Sequence[str], specs: Mapping[str, AnySpec]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(specs[name].shape, dtype=specs[name].dtype, device="meta") for name in names}


def _shown(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
