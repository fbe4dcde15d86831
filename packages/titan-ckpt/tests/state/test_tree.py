import enum
import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

from ckpt_states import Held
from parity import same_bits
from titan_ckpt import Checkpointer, CheckpointError
from titan_ckpt.format.json_values import TUPLE_KEY, key_of, path_of
from titan_ckpt.state.tree import merge, split

KEYS = st.text(max_size=4).filter(lambda key: key != TUPLE_KEY) | st.sampled_from(["/", "~", "~1", "a/b", "", "."])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)
TENSORS = st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
STATES = st.recursive(
    st.dictionaries(KEYS, VALUES | TENSORS, max_size=4), lambda inner: st.dictionaries(KEYS, inner, max_size=3)
)


@given(st.dictionaries(KEYS, STATES, max_size=3))
@settings(deadline=None, max_examples=60)
def test_splitting_and_merging_give_back_the_same(state: dict[str, dict[str, Any]]) -> None:
    tensors, values = split({name: _held(part) for name, part in state.items()})
    values = json.loads(json.dumps(values))
    for name, part in state.items():
        assert same_bits(merge(name, values, tensors), part)


@given(STATES, STATES)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_state_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any], data: dict[str, Any]
) -> None:
    ckpt = Checkpointer(tmp_path_factory.mktemp("any"))
    saved = {"model": _held(model), "da/ta": _held(data)}
    ckpt.save(7, saved, data if not split({"": saved["da/ta"]})[0] else None)
    blank = {name: _held(_zeroed(held.state)) for name, held in saved.items()}
    assert ckpt.load(blank) is not None
    for name in saved:
        assert same_bits(blank[name].state, saved[name].state)


class OddDict(dict[str, Any]):
    pass


@pytest.mark.parametrize("kind", [OrderedDict, Counter, lambda items: defaultdict(int, items), OddDict])
@pytest.mark.parametrize("wrap", [lambda odd: odd, lambda odd: [odd], lambda odd: {"in": (1, {"a": odd})}])
def test_dicts_of_other_types_are_refused(kind: Callable[[Any], Any], wrap: Callable[[Any], Any]) -> None:
    for items in ({}, {"a": 1}):
        with pytest.raises(CheckpointError, match=r'state\["m"\]\["odd"\].*it would come back as a plain dict'):
            split({"m": Held(odd=wrap(kind(items)))})
    if kind is not OrderedDict:
        with pytest.raises(CheckpointError, match="it would come back as a plain dict"):
            split({"m": Held(odd=wrap(kind({"w": torch.ones(1)})))})


def test_the_state_of_a_module_is_an_ordinary_dict() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    for state in (module, Held(inner={"module": module.state_dict()}), torch.nn.Identity()):
        tensors, values = split({"m": state})
        assert values.get("m", {}) == {}
        assert len(tensors) in (0, 7)


@given(st.lists(st.text(), min_size=1), st.lists(st.text(), min_size=1))
def test_each_path_has_a_key_of_its_own(path: list[str], other: list[str]) -> None:
    assert path_of(key_of(tuple(path))) == path
    assert (key_of(tuple(path)) == key_of(tuple(other))) == (path == other)


def test_floats_survive_exactly(tmp_path: Path) -> None:
    floats = [0.1, 1e-320, 1.7976931348623157e308, -0.0, float("inf"), float("nan"), 2**53 + 1.0, 1 / 3]
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, {"x": Held(floats=floats, large=2**200, text="\ud800 \x00 ü")})
    got = Held()
    ckpt.load({"x": got})
    assert list(map(repr, got.state["floats"])) == list(map(repr, floats))
    assert (got.state["large"], got.state["text"]) == (2**200, "\ud800 \x00 ü")


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"a": {"b": object()}}, r'state\["m"\]\["a"\]\["b"\] is a object'),
        ({"a": b"bytes"}, r'state\["m"\]\["a"\] is a bytes'),
        ({"a": {1, 2}}, r"is a set"),
        ({"a": torch.float32}, r"is a torch.dtype"),
        ({"a": Colour.RED}, r"Colour"),
        ({"a": torch.Size([1])}, r"is a torch.Size"),
        ({"a": [0, {"b": 1j}]}, r'state\["m"\]\["a"\]\[1\]\["b"\] is a complex'),
        ({"a": [torch.ones(1)]}, r"tensors cannot be inside lists"),
        ({"a": {0: torch.ones(1)}}, r'state\["m"\]\["a"\] has the key 0, a int: .*get_optimizer_state_dict'),
        ({"a": [{3: "x"}]}, r'state\["m"\]\["a"\]\[0\] has the key 3'),
        ({"$tuple": 1}, r"reserves"),
        ({"a": torch.ones(1, device="meta")}, r"on the meta device"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"of layout torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, r"m/a is torch.complex128, which the safetensors format lacks"),
        (
            {"a": TwoTensor(torch.ones(1), torch.ones(1))},
            r"m/a is a TwoTensor, a tensor subclass that wraps other tensors",
        ),
        ({"\ud800": torch.ones(1)}, r'state\["m"\] has the key .* cannot be written as UTF-8'),
        ({"a": {"\ud800": 1}}, r'state\["m"\]\["a"\] has the key .* cannot be written as UTF-8'),
        ({"a": [{"\ud800": 1}]}, r'state\["m"\]\["a"\]\[0\] has the key .* cannot be written as UTF-8'),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, part: dict[str, Any], message: str) -> None:
    ckpt = Checkpointer(tmp_path, asynchronous=True)
    with pytest.raises(CheckpointError, match=message):
        ckpt.save(1, {"m": _held(part)})
    ckpt.close()
    assert list(tmp_path.iterdir()) == []  # not even the lock, which is given back


def test_metadata_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'^could not .*: metadata\["x"\] is a torch.Tensor'):
        Checkpointer(tmp_path).save(1, {}, {"x": torch.ones(1)})


def test_dicts_of_tensors_alone_leave_no_trace_in_the_json() -> None:
    tensors, values = split({"m": _held({"a": {"b": torch.ones(1)}, "e": {}}), "n": _held({"w": torch.ones(1)})})
    assert set(tensors) == {"m/a/b", "n/w"}
    assert values == {"m": {"e": {}}}


def _held(part: dict[str, Any]) -> Held:
    held = Held()
    held.state = part
    return held


def _zeroed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return {key: _zeroed(item) for key, item in value.items()} if isinstance(value, dict) else None
