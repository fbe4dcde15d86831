"""Every private API of torch and Python that this package uses, in one place.

If a new release of torch or Python breaks the package, this is the file to look at. The tests run with torch 2.11, the
oldest that is supported, and with the newest release (2.15). Each entry says what it relies on and what would replace
it.
"""

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

# Python's unpickler written in Python. The public `pickle.Unpickler` is written in C. Python 3.11: that one fills
# gigabytes of memory when a hostile file stores an object under a large memo index, and its opcodes cannot be
# overridden. It is three to four times as fast.
if TYPE_CHECKING:

    class PythonUnpickler(pickle.Unpickler):
        """What `pickle._Unpickler` has besides: its stack, and one method per opcode in a table."""

        stack: list[Any]
        dispatch: ClassVar[dict[int, Callable[[Any], None]]]

        def load_additems(self) -> None: ...
        def load_dict(self) -> None: ...
        def load_frozenset(self) -> None: ...
        def load_newobj(self) -> None: ...
        def load_reduce(self) -> None: ...
        def load_setitem(self) -> None: ...
        def load_setitems(self) -> None: ...
        def load_tuple(self) -> None: ...
        def load_tuple1(self) -> None: ...
        def load_tuple2(self) -> None: ...
        def load_tuple3(self) -> None: ...

else:
    PythonUnpickler = pickle._Unpickler


def wraps_tensors(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a subclass that wraps other tensors (quantized, nested, ...).

    `torch.utils._python_dispatch.is_traceable_wrapper_subclass` has no public equivalent.
    """
    return is_traceable_wrapper_subclass(tensor)


def strided_split_factor(placement: "Placement") -> int | None:
    """Return the split factor of a `_StridedShard`; None for any other placement.

    FSDP2 uses this placement for parameters that tensor or expert parallelism has sharded already. The class is
    private, so it is recognized by its name.
    """
    if type(placement).__name__ != "_StridedShard":
        return None
    return getattr(placement, "split_factor", 0)


def chunks_of(tensor: "DTensor") -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return offsets and sizes of the shards that a DTensor's local tensor consists of, in the global tensor.

    `__create_chunk_list__` is the protocol between DTensor and torch's distributed checkpoint; there is no public
    equivalent.
    """
    chunks: list[Any] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]


def shard_of(tensor: "DTensor", name: str, offsets: tuple[int, ...], index: int) -> torch.Tensor:
    """Return one of the shards that `chunks_of` lists, by its offsets and its index in that list.

    `__get_tensor_shard__` belongs to the same protocol.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex  # here: importing DCP takes seconds

    shard: torch.Tensor = tensor.__get_tensor_shard__(  # type: ignore[no-untyped-call]
        MetadataIndex(name, torch.Size(offsets), index)
    )
    return shard
