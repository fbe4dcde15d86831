"""Pickles read without executing them, in proportion to their size.

A pickle is a program that names classes and functions and calls them. Here no name is resolved: each allowed one is
replaced by an inert record that stores its arguments, any other name raises. And a few bytes of a pickle can build
objects that take hours to walk, hash or print, because they refer to one another many times: `Budget` counts what is
built and what a walk through the result visits, and refuses more than a multiple of the pickle's length.

Used for DCP's `.metadata`, and for the pickle in a file of `torch.save` before torch reads it.
"""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from titan_ckpt._compat import PythonUnpickler
from titan_ckpt.errors import CheckpointError

_NODES_PER_BYTE = 32  # real files need less than one
_FREE_NODES = 100_000  # for the smallest files
_BYTES_PER_NODE = 8  # of text and numbers
STORAGE = ("", "storage")  # the name under which the allowlist holds what stands for a persistent id


class Budget:
    """How many objects may be built or visited for a pickle of some bytes."""

    def __init__(self, nbytes: int) -> None:
        self._left = _FREE_NODES + _NODES_PER_BYTE * nbytes

    def spend(self, nodes: int) -> None:
        """Take away from what is left.

        Raises:
            CheckpointError: If nothing is left.
        """
        self._left -= nodes
        if self._left < 0:
            raise CheckpointError("its objects contain one another so often that reading them is out of proportion")


class Record:
    """Replaces an object of an allowed class: stores its arguments and state, and does nothing."""

    kind = ""
    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def record_class(kind: str, base: type[Record] = Record) -> type[Record]:
    """Return a new record class: a pickle can set attributes of it, which must not affect other files."""
    return type(kind, (base,), {"kind": kind, "__slots__": ()})


def load_inert(data: bytes, named: Mapping[tuple[str, str], Any], purpose: str) -> Any:
    """Read a pickle.

    Args:
        data: The pickle.
        named: What stands for each allowed name, by module and name: a record class made for this call, or a value.
        purpose: What needs no other names, for the message, e.g. "a checkpoint".

    Returns:
        Its object; walking it, with each reference followed, is in proportion to the pickle's length.

    Raises:
        CheckpointError: If it names anything else, or is out of proportion.
        Exception: Whatever an invalid pickle makes the unpickler raise.
    """
    budget = Budget(len(data))
    value = _Unpickler(data, named, purpose, budget).load()
    _walk(value, budget)
    return value


class _Unpickler(PythonUnpickler):
    """Python's unpickler with an allowlist and a budget."""

    def __init__(self, data: bytes, named: Mapping[tuple[str, str], Any], purpose: str, budget: Budget) -> None:
        super().__init__(io.BytesIO(data))
        self._named, self._purpose, self._budget = named, purpose, budget
        self._weights: dict[int, tuple[int, Any]] = {}  # of tuples and frozensets, which are kept so that ids stay

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._named[module, name]
        except KeyError:
            raise CheckpointError(
                f"it names {module[:80]}.{name[:80]}, which {self._purpose} does not need. Nothing was executed"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        """Return a stand-in for a storage, which keeps its description."""
        stand_in = self._named.get(STORAGE)
        if stand_in is None:
            raise CheckpointError("it refers to objects outside of itself")
        return stand_in(pid)

    def load_setitem(self) -> None:
        self._spend_on_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._spend_on_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._spend_on_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        self._spend_on_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        self._spend_on_keys(self.stack)
        super().load_frozenset()

    def load_tuple(self) -> None:
        super().load_tuple()
        self._weigh_top()

    def load_tuple1(self) -> None:
        super().load_tuple1()
        self._weigh_top()

    def load_tuple2(self) -> None:
        super().load_tuple2()
        self._weigh_top()

    def load_tuple3(self) -> None:
        super().load_tuple3()
        self._weigh_top()

    def load_reduce(self) -> None:
        self._spend_on_call()
        super().load_reduce()

    def load_newobj(self) -> None:
        self._spend_on_call()
        super().load_newobj()

    def load_bytearray8(self) -> None:
        raise CheckpointError("it holds a bytearray, which would be allocated before its bytes are read")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **PythonUnpickler.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.TUPLE[0]: load_tuple,
        pickle.TUPLE1[0]: load_tuple1,
        pickle.TUPLE2[0]: load_tuple2,
        pickle.TUPLE3[0]: load_tuple3,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def _weight(self, value: Any) -> int:
        """Return how many objects hashing or comparing a value visits."""
        if isinstance(value, (tuple, frozenset)):
            return self._weights.get(id(value), (1 + len(value), None))[0]
        return 1 + _size(value)

    def _weigh_top(self) -> None:
        """Note the weight of the tuple that was just made; it is kept, so that no other object gets its id."""
        top = self.stack[-1]
        self._budget.spend(1 + len(top))
        self._weights[id(top)] = (1 + sum(self._weight(item) for item in top), top)

    def _spend_on_keys(self, keys: Sequence[Any]) -> None:
        self._budget.spend(sum(self._weight(key) for key in keys))

    def _spend_on_call(self) -> None:
        """Count a call's arguments, which are on top of the stack: what is called may copy them."""
        for item in self.stack[-1]:
            inside = item if isinstance(item, (list, set, dict)) else ()
            self._budget.spend(1 + self._weight(item) + sum(self._weight(held) for held in inside))


def _walk(value: Any, budget: Budget) -> None:
    """Visit everything that a walk without a memory of what it has seen would visit."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        budget.spend(1 + _size(item))
        if isinstance(item, dict):
            budget.spend(2 * len(item))
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            budget.spend(len(item))
            waiting += item
        elif isinstance(item, Record):
            waiting += [item.args, item.state]


def _size(value: Any) -> int:
    """Return the size of text or a number in nodes."""
    if isinstance(value, (str, bytes)):
        return len(value) // _BYTES_PER_NODE
    return value.bit_length() // (8 * _BYTES_PER_NODE) if isinstance(value, int) else 0
