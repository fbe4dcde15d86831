"""What the pickle in a file of `torch.save` may name and call, so that torch's unpickler can be trusted with it.

Called by `_torch_load` before torch reads the file. Allowed is what rebuilds dense tensors and parameters, and the
types of plain values; everything is an inert record here (see `_inert_pickle`), and what is called is checked for
arguments that would allocate memory without having its bytes in the file.
"""

from typing import Any, Self

import torch

from titan_ckpt.convert._inert_pickle import STORAGE, Record, load_inert, record_class
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.dtypes import TYPE_NAMES

_REBUILT = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)
_OF_OTHER_KIND = (
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_wrapper_subclass",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_device_tensor_from_cpu_tensor",
)
_ELEMENTS = (
    *("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexDouble"),
    *("ComplexFloat", "Untyped", "Typed"),
)
_ENCODINGS = ("latin1", "latin-1", "utf-8", "ascii")


class _NotCalled(Record):
    """A class that is only named."""

    def __new__(cls, *args: Any) -> Self:
        raise CheckpointError(f"it calls {cls.kind}, which a file of weights does not need. Nothing was executed")


class _Rebuilt(Record):
    """A dense tensor or a parameter."""


class _OfOtherKind(Record):
    """A tensor that is not dense, or has no data."""

    def __new__(cls, *args: Any) -> Self:
        raise CheckpointError(f"it holds a tensor made by {cls.kind}: expected dense tensors")


class _RebuiltFromType(Record):
    """A tensor with attributes; the function that makes it is an argument."""

    def __new__(cls, *args: Any) -> Self:
        if not args or not (isinstance(args[0], type) and issubclass(args[0], _Rebuilt)):
            raise CheckpointError("it holds a tensor of another class: expected dense tensors")
        return super().__new__(cls, *args)


class _Encoded(Record):
    """Bytes, which protocol 2 writes as text with an encoding. Some codecs make their input longer each time."""

    def __new__(cls, *args: Any) -> Self:
        if len(args) != 2 or type(args[0]) is not str or args[1] not in _ENCODINGS:
            raise CheckpointError("it holds bytes in a form that torch.save does not write")
        return super().__new__(cls, *args)


class _Collected(Record):
    """A set, a Counter, a bytearray: made of what it holds, not of a length."""

    def __new__(cls, *args: Any) -> Self:
        held = args[0] if args else []
        if len(args) > 2 or (type(held) not in (list, dict, bytes, str) and not isinstance(held, _Encoded)):
            raise CheckpointError(f"it holds a {cls.kind} in a form that torch.save does not write")
        return super().__new__(cls, *args)


class _OrderedDict(dict[Any, Any]):
    """Stands for an OrderedDict, which torch.save writes as an empty one that is filled afterwards."""

    def __init__(self, *args: Any) -> None:
        if args:
            raise CheckpointError("it holds an OrderedDict in a form that torch.save does not write")
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes of a module's state dict."""


def scan_pickle(data: bytes) -> None:
    """Read the pickle of a file with inert records.

    Args:
        data: The pickle.

    Raises:
        CheckpointError: If it names or calls anything that is not allowed, or is out of proportion to its length.
        Exception: Whatever an invalid pickle makes the unpickler raise.
    """
    load_inert(data, _allowed(), "a file of weights")


def _allowed() -> dict[tuple[str, str], Any]:
    named: dict[tuple[str, str], Any] = {STORAGE: record_class("storage")}
    named |= {("torch", str(dtype).removeprefix("torch.")): dtype for dtype in [*TYPE_NAMES, torch.complex128]}
    named |= {("torch._utils", name): record_class(name, _Rebuilt) for name in _REBUILT}
    named |= {("torch._utils", name): record_class(name, _OfOtherKind) for name in _OF_OTHER_KIND}
    named["torch._tensor", "_rebuild_from_type_v2"] = record_class("_rebuild_from_type_v2", _RebuiltFromType)
    for module in ("torch", "torch.storage"):
        named |= {(module, f"{kind}Storage"): record_class(f"{kind}Storage", _NotCalled) for kind in _ELEMENTS}
    for module, name in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
        named[module, name] = record_class(name, _NotCalled)
    named |= {("torch", name): record_class(name) for name in ("Size", "device")}
    named["torch.serialization", "_get_layout"] = record_class("_get_layout")
    named["_codecs", "encode"] = record_class("encode", _Encoded)
    named["collections", "Counter"] = record_class("Counter", _Collected)
    named["collections", "OrderedDict"] = type("OrderedDict", (_OrderedDict,), {})
    for module in ("builtins", "__builtin__"):  # the second is its name in protocol 2
        named |= {(module, name): record_class(name, _Collected) for name in ("set", "bytearray")}
        named[module, "complex"] = record_class("complex")
    return named
