"""Rules between the tensors of a `Decoder` and those of other people's files, as data.

A rule ties one or a few of our names (native) to one or a few of theirs (foreign) and knows how to get from the
tensors of either side to those of the other, bit for bit. No name appears in two rules, so a model of any size can be
carried over rule by rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titan_model.convert.errors import WeightsError


@dataclass(frozen=True)
class TensorRule(ABC):
    """How a few tensors are called and laid out on both sides.

    Attributes:
        native: Names in `Decoder.state_dict()`.
        foreign: Names in the files.
    """

    native: tuple[str, ...]
    foreign: tuple[str, ...]

    @abstractmethod
    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the foreign tensors, possibly views, made of the native ones in `tensors`."""

    @abstractmethod
    def to_native(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the native tensors, possibly views, made of the foreign ones in `tensors`."""


@dataclass(frozen=True)
class Rename(TensorRule):
    """One tensor under another name."""

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensor."""
        return {self.foreign[0]: tensors[self.native[0]]}

    def to_native(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensor."""
        return {self.native[0]: tensors[self.foreign[0]]}


@dataclass(frozen=True)
class InterleavedRotary(TensorRule):
    """A projection to queries or keys whose foreign form turns neighbouring rows of a head as a pair.

    Ours turns row `i` of a head with row `i + Dh / 2`; theirs row `2 i` with row `2 i + 1`.

    Attributes:
        head_dim: Rows of one head (`Dh`).
    """

    head_dim: int

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring the rows of each pair together: `[H * Dh, D]` to the same shape."""
        ours = tensors[self.native[0]]
        pairs = ours.reshape(-1, 2, self.head_dim // 2, *ours.shape[1:])
        return {self.foreign[0]: pairs.transpose(1, 2).reshape(ours.shape)}

    def to_native(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the rows of each pair apart: `[H * Dh, D]` to the same shape."""
        theirs = tensors[self.foreign[0]]
        pairs = theirs.reshape(-1, self.head_dim // 2, 2, *theirs.shape[1:])
        return {self.native[0]: pairs.transpose(1, 2).reshape(theirs.shape)}


@dataclass(frozen=True)
class StackedExperts(TensorRule):
    """One native tensor of all experts `[E, ...]`, a foreign one for each."""

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the experts apart."""
        return dict(zip(self.foreign, tensors[self.native[0]].unbind(0), strict=True))

    def to_native(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stack the experts."""
        return {self.native[0]: torch.stack([tensors[name] for name in self.foreign])}


@dataclass(frozen=True)
class FusedExperts(TensorRule):
    """Two native tensors `[E, F, D]`, gate and up, that are one foreign tensor `[E, 2 F, D]`."""

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join gate and up."""
        return {self.foreign[0]: torch.cat([tensors[name] for name in self.native], dim=1)}

    def to_native(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Part gate and up."""
        return dict(zip(self.native, tensors[self.foreign[0]].chunk(2, dim=1), strict=True))


@dataclass(frozen=True)
class ZeroOnly(TensorRule):
    """A native tensor that has no foreign counterpart and changes nothing while it is zero.

    Attributes:
        shape: Its shape.
    """

    shape: tuple[int, ...]

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing.

        Raises:
            WeightsError: If the tensor is not zero, so that the foreign model would be another one.
        """
        tensor = tensors[self.native[0]]
        if not tensor.is_meta and bool(tensor.count_nonzero()):
            raise WeightsError(
                f"{self.native[0]} is not zero, and the target format has no place for it: the exported model would "
                "choose other experts. Train with moe.balance_bias_rate = 0 what is to be exported to this format"
            )
        return {}

    def to_native(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros in fp32."""
        return {self.native[0]: torch.zeros(self.shape)}


@dataclass(frozen=True)
class WeightMap:
    """Everything that separates a `Decoder`'s weights from a file format.

    Attributes:
        rules: One for each group of tensors, in the order of the model.
        config: The format's own description of the model: what goes into config.json or params.json.
        aliases: Foreign names that files may hold besides, each with the foreign name whose copy it is (tied heads).
        ignored: Regular expressions of foreign names that files may hold besides and that say nothing.
    """

    rules: tuple[TensorRule, ...]
    config: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
