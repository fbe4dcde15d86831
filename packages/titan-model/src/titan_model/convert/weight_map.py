"""Rules between the tensors of a `Decoder` and those of external file formats, as data.

A rule connects one or a few names of a `Decoder` (internal) with one or a few names in files (external) and converts
the tensors of either side to those of the other, bit for bit. No name appears in two rules, so a model of any size can
be converted rule by rule.

Made by `huggingface_names` and `meta_llama`; used by `loading`, `huggingface_files` and, for streaming conversion of
checkpoints, by titan-ckpt.
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
    """Names and layouts of a few tensors on both sides.

    Attributes:
        internal: Names in `Decoder.state_dict()`.
        external: Names in the files.
    """

    internal: tuple[str, ...]
    external: tuple[str, ...]

    @abstractmethod
    def to_external(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the external tensors, possibly views, made from the internal ones in `tensors`."""

    @abstractmethod
    def to_internal(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the internal tensors, possibly views, made from the external ones in `tensors`."""


@dataclass(frozen=True)
class Rename(TensorRule):
    """One tensor with another name."""

    def to_external(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensor."""
        return {self.external[0]: tensors[self.internal[0]]}

    def to_internal(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensor."""
        return {self.internal[0]: tensors[self.external[0]]}


@dataclass(frozen=True)
class InterleavedRotary(TensorRule):
    """A projection to queries or keys whose external form pairs neighboring rows of a head for the rotation.

    A `Decoder` pairs row `i` of a head with row `i + Dh / 2`; the external form pairs row `2 i` with row `2 i + 1`.

    Attributes:
        head_dim: Rows of one head (`Dh`).
    """

    head_dim: int

    def to_external(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Interleave the two halves of each head: `[H * Dh, D]` to the same shape."""
        halves = tensors[self.internal[0]]
        pairs = halves.reshape(-1, 2, self.head_dim // 2, *halves.shape[1:])
        return {self.external[0]: pairs.transpose(1, 2).reshape(halves.shape)}

    def to_internal(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Separate the rows of each pair into two halves: `[H * Dh, D]` to the same shape."""
        interleaved = tensors[self.external[0]]
        pairs = interleaved.reshape(-1, self.head_dim // 2, 2, *interleaved.shape[1:])
        return {self.internal[0]: pairs.transpose(1, 2).reshape(interleaved.shape)}


@dataclass(frozen=True)
class StackedExperts(TensorRule):
    """One internal tensor of all experts `[E, ...]`, one external tensor per expert."""

    def to_external(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unstack the experts."""
        return dict(zip(self.external, tensors[self.internal[0]].unbind(0), strict=True))

    def to_internal(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stack the experts."""
        return {self.internal[0]: torch.stack([tensors[name] for name in self.external])}


@dataclass(frozen=True)
class Concatenated(TensorRule):
    """Several internal tensors that are one external tensor (experts' gate and up, queries, keys and values, ...).

    Attributes:
        sizes: Their sizes in that dim.
        dim: The dim in which they follow one another.
    """

    sizes: tuple[int, ...]
    dim: int = 0

    def to_external(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Concatenate the tensors."""
        return {self.external[0]: torch.cat([tensors[name] for name in self.internal], dim=self.dim)}

    def to_internal(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split the tensor."""
        return dict(zip(self.internal, tensors[self.external[0]].split_with_sizes(self.sizes, self.dim), strict=True))


@dataclass(frozen=True)
class ZeroOnly(TensorRule):
    """An internal tensor without external counterpart, which has no effect while it is zero.

    Attributes:
        shape: Its shape.
    """

    shape: tuple[int, ...]

    def to_external(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing.

        Raises:
            WeightsError: If the tensor is not zero, so that the external model would behave differently.
        """
        tensor = tensors[self.internal[0]]
        if not tensor.is_meta and bool(tensor.count_nonzero()):
            raise WeightsError(
                f"{self.internal[0]} is not zero, and the target format cannot store it: the exported model would "
                "choose other experts. To export to this format, train with moe.balance_bias_rate = 0"
            )
        return {}

    def to_internal(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros in fp32."""
        return {self.internal[0]: torch.zeros(self.shape)}


@dataclass(frozen=True)
class DecoderWeightMap:
    """How a `Decoder`'s weights are stored in an external file format.

    Attributes:
        rules: One rule for each group of tensors, in the order of the model.
        config: The contents of the format's config.json or params.json.
        aliases: External names that files may contain in addition or instead, each with the external name that it is a
            copy of (tied heads).
        ignored: Regular expressions of external names that files may contain in addition and that are not read.
    """

    rules: tuple[TensorRule, ...]
    config: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
