"""Sources, weight maps and small models of other formats, for the tests of conversion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_ckpt.convert.source import Spec
from titan_ckpt.format.boxes import Box


class Tensors:
    """A source that is a dict; it notes what is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any] | None = None) -> None:
        self._tensors = dict(tensors)
        self.values = dict(values or {})
        self.tensors = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.whole: list[str] = []
        self.slices: list[tuple[str, Box]] = []

    def read(self, name: str) -> torch.Tensor:
        self.whole.append(name)
        return self._tensors[name]

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        box = Box(tuple(offsets), tuple(sizes))
        self.slices.append((name, box))
        return self._tensors[name][box.slices]


@dataclass
class Rename:
    internal: Sequence[str]
    external: Sequence[str]

    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.external[0]: tensors[self.internal[0]]}

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.internal[0]: tensors[self.external[0]]}


class Transpose(Rename):
    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.external[0]: tensors[self.internal[0]].mT}

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.internal[0]: tensors[self.external[0]].mT}


class Tied(Rename):
    """Several internal names of one tensor, one external name."""

    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.external[0]: tensors[self.internal[0]]}

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(self.internal, tensors[self.external[0]])


@dataclass
class Fused(Rename):
    """One internal tensor, cut along dimension 0 into the external ones."""

    sizes: Sequence[int] = ()

    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.external, torch.split(tensors[self.internal[0]], list(self.sizes)), strict=True))

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.internal[0]: torch.cat([tensors[name] for name in self.external])}


@dataclass
class Stacked(Rename):
    """One internal tensor of experts, one external tensor for each."""

    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.external, tensors[self.internal[0]].unbind(), strict=True))

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.internal[0]: torch.stack([tensors[name] for name in self.external])}


@dataclass
class Map:
    rules: Sequence[Any]
    config: Mapping[str, Any] = field(default_factory=dict)


def small_map() -> Map:
    return Map(
        [
            Tied(["embed", "head"], ["tok.weight"]),
            Fused(["qkv"], ["q", "k", "v"], [4, 2, 2]),
            Transpose(["up"], ["c_fc"]),
            Stacked(["experts"], ["e.0", "e.1", "e.2"]),
            Rename(["norm"], ["ln"]),
        ],
        {"model_type": "small"},
    )


def make_small_map(config: Mapping[str, Any]) -> Map:
    """`small_map` for the command line: `--map ckpt_sources:make_small_map`."""
    return small_map()


def small_internal() -> dict[str, torch.Tensor]:
    """What `small_map` is of; `embed` and `head` are tied."""
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(6, 4, generator=generator)
    return {
        "embed": embed,
        "head": embed,
        "qkv": torch.randn(8, 4, generator=generator),
        "up": torch.randn(4, 5, generator=generator),
        "experts": torch.randn(3, 2, 4, generator=generator),
        "norm": torch.randn(4, generator=generator).to(torch.bfloat16),
    }


def small_external() -> dict[str, torch.Tensor]:
    """The same, written out by hand as the other side has it."""
    internal = small_internal()
    return {
        "tok.weight": internal["embed"],
        "q": internal["qkv"][:4],
        "k": internal["qkv"][4:6],
        "v": internal["qkv"][6:],
        "c_fc": internal["up"].T.contiguous(),
        "e.0": internal["experts"][0],
        "e.1": internal["experts"][1],
        "e.2": internal["experts"][2],
        "ln": internal["norm"],
    }


def prefixed(tensors: Mapping[str, torch.Tensor], prefix: str = "model/") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def read_all(source: Any) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.tensors}
