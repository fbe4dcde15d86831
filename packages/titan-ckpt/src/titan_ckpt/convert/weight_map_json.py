"""A weight map as a JSON file, for those who would not write one in Python.

{"config": {"architectures": ["LlamaForCausalLM"]},
 "rules": [
  {"native": "embed.weight", "foreign": "model.embed_tokens.weight"},
  {"native": "layers.{i}.proj.weight", "foreign": "model.layers.{i}.c_proj.weight", "transpose": true,
   "repeat": {"i": 32}},
  {"native": "layers.{i}.qkv.weight", "join": "cat", "dim": 0, "sizes": [4096, 1024, 1024], "repeat": {"i": 32},
   "foreign": ["model.layers.{i}.q.weight", "model.layers.{i}.k.weight", "model.layers.{i}.v.weight"]},
  {"native": "layers.{i}.experts.w1", "foreign": "model.layers.{i}.experts.{e}.w1", "join": "stack", "dim": 0,
   "repeat": {"i": 32}, "over": {"e": 8}},
  {"native": ["embed.weight", "head.weight"], "foreign": "model.embed_tokens.weight", "join": "tie"}]}
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_ckpt.convert._json import read_json
from titan_ckpt.errors import CheckpointError

_KEYS = {"native", "foreign", "transpose", "join", "dim", "sizes", "repeat", "over"}
_JOINS = ("cat", "stack", "tie")


@dataclass(frozen=True)
class JsonRule:
    """One rule, with its names written out.

    Attributes:
        native: the names on the native side.
        foreign: the names on the other.
        join: how the side with several names makes the one of the other side: "cat", "stack", or "tie" for several
            names of one tensor; None where both sides have one name.
        dim: the dimension of a cat or stack.
        sizes: how the cat is cut again; None for equal parts.
        transpose: whether the last two dimensions change places.
    """

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    join: str | None = None
    dim: int = 0
    sizes: tuple[int, ...] | None = None
    transpose: bool = False

    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the foreign tensors."""
        return self._across(tensors, self.native, self.foreign)

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the native tensors."""
        return self._across(tensors, self.foreign, self.native)

    def _across(
        self, tensors: Mapping[str, torch.Tensor], given: Sequence[str], wanted: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        parts = [tensors[name].mT if self.transpose else tensors[name] for name in given]
        if self.join == "tie":
            return dict.fromkeys(wanted, parts[0])
        if len(given) > 1:
            joined = torch.stack(parts, self.dim) if self.join == "stack" else torch.cat(parts, self.dim)
            return {wanted[0]: joined}
        if len(wanted) == 1:
            return {wanted[0]: parts[0]}
        return dict(zip(wanted, self._cut(parts[0], len(wanted)), strict=True))

    def _cut(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        if self.join == "stack":
            return tensor.unbind(self.dim)
        if self.sizes is not None:
            return torch.split(tensor, list(self.sizes), self.dim)
        if tensor.shape[self.dim] % count:
            raise ValueError(f'{tensor.shape[self.dim]} is not divisible by {count}: give "sizes"')
        return tensor.chunk(count, self.dim)


@dataclass(frozen=True)
class JsonMap:
    """A weight map that was read from a file."""

    rules: tuple[JsonRule, ...]
    config: Mapping[str, Any]


def read_json_map(path: str | Path) -> JsonMap:
    """Read a weight map.

    Args:
        path: a JSON file, as the head of this file shows one.

    Returns:
        The map.

    Raises:
        CheckpointError: when it is no such file; the message names the rule.
    """
    content = read_json(Path(path))
    if not content.keys() <= {"rules", "config"} or not isinstance(content.get("rules"), list):
        raise CheckpointError(f'{path}: a weight map has "rules", a list, and perhaps "config"')
    config = content.get("config", {})
    if not isinstance(config, dict):
        raise CheckpointError(f'{path}: "config" must be an object')
    rules: list[JsonRule] = []
    for place, described in enumerate(content["rules"]):
        try:
            rules += _rules_of(described)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{path}: rules[{place}]: {told}") from error
    return JsonMap(tuple(rules), config)


def _rules_of(described: Any) -> list[JsonRule]:
    if not isinstance(described, dict):
        raise ValueError("a rule is an object")
    unknown = sorted(described.keys() - _KEYS)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is unknown; there are {', '.join(sorted(_KEYS))}")
    join, sizes = described.get("join"), described.get("sizes")
    if join is not None and join not in _JOINS:
        raise ValueError(f'"join" is one of {", ".join(_JOINS)}, not {join!r}')
    over = _ranges(described.get("over", {}))
    rules = []
    for values in _ranges(described.get("repeat", {})):
        native, foreign = (_names(described[side], values, over) for side in ("native", "foreign"))
        if (len(native) > 1 or len(foreign) > 1) and join is None:
            raise ValueError('several names on one side need "join"')
        if join != "tie" and len(native) > 1 and len(foreign) > 1:
            raise ValueError("one side must have one name")
        rules.append(
            JsonRule(
                native,
                foreign,
                join,
                _typed(described.get("dim", 0), int),
                None if sizes is None else tuple(_typed(size, int) for size in _typed(sizes, list)),
                _typed(described.get("transpose", False), bool),
            )
        )
    return rules


def _ranges(counts: Any) -> list[dict[str, int]]:
    """Return all combinations of what the letters stand for."""
    counts = _typed(counts, dict)
    if any(type(count) is not int or not 0 < count <= 100_000 for count in counts.values()):
        raise ValueError("a range is a number from 1 upwards")
    if math.prod(counts.values()) > 1_000_000:
        raise ValueError(f"{counts} makes more rules than any model has tensors")
    return [
        dict(zip(counts, values, strict=True)) for values in itertools.product(*(range(n) for n in counts.values()))
    ]


def _names(described: Any, values: Mapping[str, int], over: Sequence[Mapping[str, int]]) -> tuple[str, ...]:
    patterns = described if isinstance(described, list) else [described]
    names = [_filled(_typed(pattern, str), {**values, **each}) for pattern in patterns for each in over]
    return tuple(dict.fromkeys(names))


def _filled(pattern: str, values: Mapping[str, int]) -> str:
    for letter, value in values.items():
        pattern = pattern.replace(f"{{{letter}}}", str(value))
    return pattern


def _typed(value: Any, kind: Callable[..., Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {getattr(kind, '__name__', kind)}")
    return value
