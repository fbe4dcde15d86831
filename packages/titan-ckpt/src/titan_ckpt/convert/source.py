"""What can be converted: tensors known by name, type and shape, and read one at a time.

A checkpoint of this package, a Hugging Face folder, a DCP folder and a file of `torch.save` all come as a
`TensorSource`. Views over a source (some of its names, another dtype, the names of a weight map) are sources again, so
a conversion is a source, some views and something that writes; none of them holds more than it is asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Protocol

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box


class AnySpec(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape, whatever pieces it lies in."""
        ...


class TensorSource(Protocol):
    """Tensors that are read one by one."""

    @property
    def tensors(self) -> Mapping[str, AnySpec]:
        """What there is, in the order in which it is best read."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """What is not a tensor, by top-level entry."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole, to CPU memory."""
        ...

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read the part of a tensor that starts at `offsets` and has the shape `sizes`."""
        ...


@dataclass(frozen=True)
class Spec:
    """An AnySpec that stands for itself."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def size_of(spec: AnySpec) -> int:
    """Return how many bytes a tensor takes."""
    return prod(spec.shape) * spec.dtype.itemsize


class Whole:
    """What a source inherits that can only read whole tensors."""

    values: Mapping[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole, to CPU memory."""
        raise NotImplementedError

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read the tensor and return a part of it."""
        return self.read(name)[Box(tuple(offsets), tuple(sizes)).slices]


class Under:
    """The tensors of a source whose names begin with a prefix, under what is left of their names."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        """Look at a part of a source.

        Args:
            source: the whole.
            prefix: e.g. `model/`; "" for everything.

        Raises:
            CheckpointError: when no name begins with it.
        """
        self._source, self._prefix = source, prefix
        self.tensors = {
            name.removeprefix(prefix): spec for name, spec in source.tensors.items() if name.startswith(prefix)
        }
        self.values: Mapping[str, Any] = {} if prefix else source.values
        if not self.tensors:
            raise CheckpointError(_nothing_under(prefix, list(source.tensors)))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        return self._source.read(self._prefix + name)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor."""
        return self._source.read_slice(self._prefix + name, offsets, sizes)


class Without:
    """A source without the tensors whose names match one of some patterns."""

    def __init__(self, source: TensorSource, patterns: Sequence[str]) -> None:
        """Look at a part of a source.

        Args:
            source: the whole.
            patterns: shell patterns, e.g. `*.rotary_emb.inv_freq`.
        """
        self._source, self.values = source, source.values
        self.tensors = {
            name: spec
            for name, spec in source.tensors.items()
            if not any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        return self._source.read(name)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor."""
        return self._source.read_slice(name, offsets, sizes)


class Cast:
    """A source whose floating-point tensors come in another dtype; integers and booleans stay as they are."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        """Look at a source in another dtype.

        Args:
            source: what to look at.
            dtype: a floating-point type.
        """
        if not dtype.is_floating_point:
            raise CheckpointError(f"weights are converted to a floating-point type, not to {dtype}")
        self._source, self._dtype, self.values = source, dtype, source.values
        self.tensors = {
            name: Spec(dtype if spec.dtype.is_floating_point else spec.dtype, tuple(spec.shape))
            for name, spec in source.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        return self._source.read(name).to(self.tensors[name].dtype)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a part of one tensor."""
        return self._source.read_slice(name, offsets, sizes).to(self.tensors[name].dtype)


def _nothing_under(prefix: str, names: list[str]) -> str:
    if not names:
        return "there is no tensor in it at all"
    tops = sorted({name.split("/")[0] + "/" if "/" in name else name for name in names})
    shown = ", ".join(tops[:8]) + (", ..." if len(tops) > 8 else "")
    return f"no tensor's name begins with {prefix!r}; names begin with {shown}. Give the prefix that the model has"
