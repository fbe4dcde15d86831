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
    native: Sequence[str]
    foreign: Sequence[str]

    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.foreign[0]: tensors[self.native[0]]}

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.native[0]: tensors[self.foreign[0]]}


class Transpose(Rename):
    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.foreign[0]: tensors[self.native[0]].mT}

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.native[0]: tensors[self.foreign[0]].mT}


class Tied(Rename):
    """Several native names of one tensor, one foreign name."""

    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.foreign[0]: tensors[self.native[0]]}

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(self.native, tensors[self.foreign[0]])


@dataclass
class Fused(Rename):
    """One native tensor, cut along dimension 0 into the foreign ones."""

    sizes: Sequence[int] = ()

    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.foreign, torch.split(tensors[self.native[0]], list(self.sizes)), strict=True))

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.native[0]: torch.cat([tensors[name] for name in self.foreign])}


@dataclass
class Stacked(Rename):
    """One native tensor of experts, one foreign tensor for each."""

    def to_foreign(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.foreign, tensors[self.native[0]].unbind(), strict=True))

    def to_native(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.native[0]: torch.stack([tensors[name] for name in self.foreign])}


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


# The same map as JSON.
SMALL_JSON = {
    "config": {"model_type": "small"},
    "rules": [
        {"native": ["embed", "head"], "foreign": "tok.weight", "join": "tie"},
        {"native": "qkv", "foreign": ["q", "k", "v"], "join": "cat", "sizes": [4, 2, 2]},
        {"native": "up", "foreign": "c_fc", "transpose": True},
        {"native": "experts", "foreign": "e.{n}", "join": "stack", "over": {"n": 3}},
        {"native": "norm", "foreign": "ln"},
    ],
}


def small_native() -> dict[str, torch.Tensor]:
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


def small_foreign() -> dict[str, torch.Tensor]:
    """The same, written out by hand as the other side has it."""
    native = small_native()
    return {
        "tok.weight": native["embed"],
        "q": native["qkv"][:4],
        "k": native["qkv"][4:6],
        "v": native["qkv"][6:],
        "c_fc": native["up"].T.contiguous(),
        "e.0": native["experts"][0],
        "e.1": native["experts"][1],
        "e.2": native["experts"][2],
        "ln": native["norm"],
    }


def prefixed(tensors: Mapping[str, torch.Tensor], prefix: str = "model/") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether two dicts hold the same names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_all(source: Any) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.tensors}
