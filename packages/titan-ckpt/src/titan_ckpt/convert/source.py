"""`TensorSource`: tensors known by name, dtype and shape, and read one at a time.

A checkpoint of this package, a Hugging Face directory, a DCP directory and a file of `torch.save` are all read as a
`TensorSource`. Views of a source (without a prefix, without some names, in another dtype, through a weight map) are
sources again. So a conversion is a source, some views and a writer, and none of them holds more than it is asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Protocol

import torch

from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.boxes import Box
from titan_ckpt.format.dtypes import CASTABLE, can_cast


class AnySpec(Protocol):
    """Metadata of a tensor, known without reading its data."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its global shape, whatever chunks it is stored in."""
        ...


class TensorSource(Protocol):
    """Tensors that are read one at a time."""

    @property
    def tensors(self) -> Mapping[str, AnySpec]:
        """Metadata of the tensors by name, in the best order for reading them."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """Everything that is not a tensor, by top-level entry."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor to CPU memory."""
        ...

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read the slice of a tensor that starts at `offsets` and has the shape `sizes`."""
        ...


@dataclass(frozen=True)
class Spec:
    """A plain AnySpec."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def size_of(spec: AnySpec) -> int:
    """Return the size of a tensor in bytes."""
    return prod(spec.shape) * spec.dtype.itemsize


class FullTensorSource:
    """Base class of sources that can only read full tensors."""

    values: Mapping[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor to CPU memory."""
        raise NotImplementedError

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read the full tensor and return a slice of it."""
        return self.read(name)[Box(tuple(offsets), tuple(sizes)).slices]


class StripPrefix:
    """The tensors of a source whose names start with a prefix, with the prefix removed."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        """Create the view.

        Args:
            source: The underlying source.
            prefix: The prefix, e.g. `model/`; "" selects everything.

        Raises:
            CheckpointError: If no name starts with it.
        """
        self._source, self._prefix = source, prefix
        self.tensors = {
            name.removeprefix(prefix): spec for name, spec in source.tensors.items() if name.startswith(prefix)
        }
        self.values: Mapping[str, Any] = {} if prefix else source.values
        if not self.tensors:
            raise CheckpointError(_no_such_prefix(prefix, list(source.tensors)))

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        return self._source.read(self._prefix + name)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor."""
        return self._source.read_slice(self._prefix + name, offsets, sizes)


class Exclude:
    """A source without the tensors whose names match any of some patterns."""

    def __init__(self, source: TensorSource, patterns: Sequence[str]) -> None:
        """Create the view.

        Args:
            source: The underlying source.
            patterns: Shell patterns, e.g. `*.rotary_emb.inv_freq`.
        """
        self._source, self.values = source, source.values
        self.tensors = {
            name: spec
            for name, spec in source.tensors.items()
            if not any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        return self._source.read(name)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor."""
        return self._source.read_slice(name, offsets, sizes)


class Cast:
    """A source with its floating-point tensors cast to another dtype; integers and booleans are unchanged.

    Float8 is refused: it holds codes of quantized weights, which are numbers only together with their scales.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        """Create the view.

        Args:
            source: The underlying source.
            dtype: float64, float32, float16 or bfloat16.

        Raises:
            CheckpointError: If it is another dtype, or a tensor is quantized.
        """
        if dtype not in CASTABLE:
            raise CheckpointError(f"weights can only be converted to {_names(CASTABLE)}, not to {dtype}")
        refused = [
            f"{name} is {spec.dtype}"
            for name, spec in source.tensors.items()
            if spec.dtype.is_floating_point and not can_cast(spec.dtype, dtype)
        ]
        if refused:
            raise CheckpointError(
                f"{_first(refused)}: quantized weights cannot be converted to {dtype}; dequantize them first, or keep "
                "their dtypes"
            )
        self._source, self._dtype, self.values = source, dtype, source.values
        self.tensors = {
            name: Spec(dtype if spec.dtype.is_floating_point else spec.dtype, tuple(spec.shape))
            for name, spec in source.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        with system_errors(f"convert {name} to {self._dtype}"):
            return self._source.read(name).to(self.tensors[name].dtype)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a slice of a tensor."""
        return self._source.read_slice(name, offsets, sizes).to(self.tensors[name].dtype)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _first(listed: Sequence[str]) -> str:
    return listed[0] + (f" (and {len(listed) - 1} more)" if len(listed) > 1 else "")


def _no_such_prefix(prefix: str, names: list[str]) -> str:
    if not names:
        return "it holds no tensors"
    tops = sorted({name.split("/")[0] + "/" if "/" in name else name for name in names})
    shown = ", ".join(tops[:8]) + (", ..." if len(tops) > 8 else "")
    return f"no tensor's name starts with {prefix!r}; names start with {shown}. Give the prefix of the model's tensors"
