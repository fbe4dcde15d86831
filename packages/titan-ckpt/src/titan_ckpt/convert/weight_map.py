"""Weight maps: how the names and shapes of one side become those of the other, rule by rule.

A map comes from outside, from whoever knows both models. This file says what it must look like, and reads a source
through it: the shapes on the other side are found by running the rules on tensors of torch's meta device, which have
no data, so that all mistakes are told before a byte is read.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from titan_ckpt.convert.source import AnySpec, Spec, TensorSource, Whole
from titan_ckpt.errors import CheckpointError

Direction = Literal["to_foreign", "to_native"]


class TensorRule(Protocol):
    """A few tensors of one side that make a few of the other, e.g. q, k and v to one and back.

    The two functions are of torch operations that also run on the meta device, leave what they are given unchanged,
    and return just the names that they announce. One that only renames returns the very tensor that it was given:
    then a sharded load reads no more than its shard.
    """

    @property
    def native(self) -> Sequence[str]:
        """The names on the side of the training code."""
        ...

    @property
    def foreign(self) -> Sequence[str]:
        """The names on the other side, e.g. Hugging Face's."""
        ...

    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Make the foreign tensors from the native ones."""
        ...

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Make the native tensors from the foreign ones."""
        ...


class WeightMap(Protocol):
    """The rules for one model, and what else the other side wants to know of it.

    Tied weights are one rule: all native names, one foreign name; `to_foreign` takes one of them, `to_native` gives
    the same tensor under all names.
    """

    @property
    def rules(self) -> Sequence[TensorRule]:
        """The rules, in the order in which the tensors are to be written."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What goes into `config.json`."""
        ...


class Mapped(Whole):
    """A source seen through a weight map.

    A rule's tensors are made when the first is asked for, and each is let go of as it is given out: read in the order
    of `tensors`, no more than one rule's tensors are in memory.
    """

    def __init__(self, source: TensorSource, rules: Sequence[TensorRule], direction: Direction) -> None:
        """Plan the tensors of the other side; nothing is read.

        Args:
            source: what to look at; each of its tensors must be used by a rule (see `Without`).
            rules: the map's rules.
            direction: "to_foreign" when the source holds native tensors, "to_native" when it holds foreign ones.

        Raises:
            CheckpointError: when the rules do not fit the source, all of it in one message, or one another.
        """
        self._source, self._direction = source, direction
        self.values = source.values
        inputs = [inputs_of(rule, direction) for rule in rules]
        outputs = [outputs_of(rule, direction) for rule in rules]
        wanted = {name for names in inputs for name in names}
        refuse_unfit(
            "the weight map does not fit the tensors at hand",
            {
                "missing, wanted by the map": wanted - source.tensors.keys(),
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
        """Read what its rule needs and make it; the rule's other tensors are kept until another rule's turn."""
        if name not in self._made:
            rule = self._rule_of[name]
            given = {wanted: self._source.read(wanted) for wanted in inputs_of(rule, self._direction)}
            self._made = apply(rule, self._direction, given)
        tensor, spec = self._made.pop(name), self.tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise CheckpointError(
                f"the weight map makes {name} as {_shown(tensor)} where it announced {spec.dtype} {list(spec.shape)}"
            )
        return tensor


def inputs_of(rule: TensorRule, direction: Direction) -> Sequence[str]:
    """Return the names that a rule reads."""
    return rule.native if direction == "to_foreign" else rule.foreign


def outputs_of(rule: TensorRule, direction: Direction) -> Sequence[str]:
    """Return the names that a rule makes."""
    return rule.foreign if direction == "to_foreign" else rule.native


def apply(rule: TensorRule, direction: Direction, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run one rule.

    Args:
        rule: the rule.
        direction: which of its functions.
        given: its inputs by name.

    Returns:
        Its outputs by name, just those that it announces.

    Raises:
        CheckpointError: when the function fails or returns anything else.
    """
    try:
        made = rule.to_foreign(given) if direction == "to_foreign" else rule.to_native(given)
    except Exception as error:  # somebody else's function: whatever it raises becomes one message
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
        raise CheckpointError(f"the weight map's rule for {shapes} failed: {type(error).__name__}: {error}") from error
    announced = outputs_of(rule, direction)
    if not isinstance(made, Mapping) or set(made) != set(announced):
        got = list(made) if isinstance(made, Mapping) else type(made).__name__
        raise CheckpointError(f"the weight map's rule for {', '.join(announced)} returned {got} instead")
    return dict(made)


def probe(rule: TensorRule, direction: Direction, specs: Mapping[str, AnySpec]) -> dict[str, AnySpec]:
    """Find the types and shapes that a rule makes, without data.

    Args:
        rule: the rule.
        direction: which of its functions.
        specs: what is known of its inputs, among others.

    Returns:
        What it makes, in the rule's order.
    """
    made = apply(rule, direction, _bare(inputs_of(rule, direction), specs))
    return {name: Spec(made[name].dtype, tuple(made[name].shape)) for name in outputs_of(rule, direction)}


def renames(rule: TensorRule, direction: Direction, specs: Mapping[str, AnySpec]) -> bool:
    """Tell whether all that a rule does is to give one tensor other names."""
    names = inputs_of(rule, direction)
    if len(names) != 1:
        return False
    bare = _bare(names, specs)
    return all(tensor is bare[names[0]] for tensor in apply(rule, direction, bare).values())


def refuse_unfit(what: str, groups: Mapping[str, Iterator[str] | set[str]]) -> None:
    """Raise one error for all that does not fit, by kind.

    Args:
        what: the first line.
        groups: for each kind of misfit, the lines to show.

    Raises:
        CheckpointError: unless all groups are empty.
    """
    lines = []
    for title, told in groups.items():
        if told:
            lines += [f"  {title} ({len(set(told))}):", *(f"    {line}" for line in sorted(told))]
    if lines:
        raise CheckpointError("\n".join([f"{what}:", *lines]))


def _bare(names: Sequence[str], specs: Mapping[str, AnySpec]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(specs[name].shape, dtype=specs[name].dtype, device="meta") for name in names}


def _shown(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
