"""Random changes to a checkpoint's files: it reads as it was saved, or it is refused as a CheckpointError."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_hostile import DATA, TENSORS, VALUES, forge_file, make_checkpoint, seal, split_file
from ckpt_sources import read_all
from ckpt_states import Held
from parity import same_bits
from titan_ckpt import Checkpointer, CheckpointError, list_checkpoints, open_checkpoint, verify
from titan_ckpt.convert.safetensors_file import SafetensorsFile

FILES = ("manifest.json", "state.json", DATA)
FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))

# What stands where another value should: of wrong kinds, and on the edges of what numbers hold.
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 1 << 31, 1 << 32, 1 << 53, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 10**30),
    *(1.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "..", "../x", "/etc/passwd", "\0", "a" * 500, "0" * 32, "\ud800"),
    *("manifest.json", "state.json", DATA, "model/w", "float32", "F32", "$tuple"),
    *([], {}, [[]], [{}], {"": None}, [0] * 100, {"$tuple": 3}, {"$tuple": [1, 2]}, [-1, -1], [1 << 62, 1 << 62]),
]
ODD = st.one_of(st.sampled_from(ODD_VALUES), st.integers(), st.text(max_size=8))


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("valid"))


@pytest.fixture(scope="module")
def forged(valid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(valid, tmp_path_factory.mktemp("fuzz") / valid.name))


def restore(valid: Path, forged: Path) -> None:
    for name in FILES:
        (forged / name).write_bytes((valid / name).read_bytes())


def read(path: Path) -> tuple[dict[str, torch.Tensor], Any] | None:
    """Return what the checkpoint holds, or None when it is refused; whatever else is raised fails the test."""
    try:
        with open_checkpoint(str(path)) as checkpoint:
            return read_all(checkpoint), checkpoint.values
    except CheckpointError:
        return None


def look(path: Path) -> None:
    """What a job and the command line do with a folder must survive it as well."""
    assert isinstance(verify(str(path), "checksum"), list)
    assert isinstance(verify(str(path)), list)
    for info in list_checkpoints(str(path.parent)):
        assert info.step == 1
    state = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items() if name.startswith("model/")}
    held = Held(**{name.removeprefix("model/"): tensor for name, tensor in state.items()})
    try:
        Checkpointer(path.parent).load({"model": held})
    except CheckpointError:
        return


@st.composite
def byte_changes(draw: st.DrawFn, length: int) -> list[tuple[int, int, bytes]]:
    """Spans to be replaced by other bytes: flips, cuts, insertions."""
    changes = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, length))
        removed = draw(st.sampled_from([0, 1, 1, 1, 2, 8, 1000]))
        changes.append((start, removed, draw(st.binary(max_size=9))))
    return changes


def changed(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for start, removed, added in changes:
        data = data[:start] + added + data[start + removed :]
    return data


@FUZZ
@given(data=st.data())
def test_bytes_that_change_are_noticed(valid: Path, forged: Path, data: st.DataObject) -> None:
    restore(valid, forged)
    name = data.draw(st.sampled_from(FILES))
    before = (valid / name).read_bytes()
    (forged / name).write_bytes(changed(before, data.draw(byte_changes(len(before)))))
    found = read(forged)
    if found is not None:
        assert same_bits(found[0], TENSORS)
        assert found[1] == VALUES
    look(forged)


@FUZZ
@given(data=st.data())
def test_bytes_that_change_under_valid_checksums(valid: Path, forged: Path, data: st.DataObject) -> None:
    restore(valid, forged)
    name = data.draw(st.sampled_from(FILES[1:]))
    before = (valid / name).read_bytes()
    # Most of a header or an index, not of the data, which the checksums of pieces protect.
    (forged / name).write_bytes(changed(before, data.draw(byte_changes(min(len(before), 400)))))
    seal(forged)
    read(forged)
    look(forged)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from places(item, (*path, place))


def mutate(draw: Any, content: Any) -> Any:
    """Replace, remove, double or rename a few values of a JSON value."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(content))))
        what = draw(st.sampled_from(["replace", "replace", "remove", "copy", "rename"]))
        if not path:
            continue
        at = content
        for part in path[:-1]:
            at = at[part]
        last = path[-1]
        if what == "replace":
            at[last] = copy.deepcopy(draw(ODD))
        elif what == "remove":
            del at[last]
        elif what == "copy":
            other = draw(st.sampled_from([other for other in places(content) if other]))
            source = content
            for part in other:
                source = source[part]
            at[last] = json.loads(json.dumps(source))
        elif isinstance(at, dict):
            at[str(draw(ODD))] = at.pop(last)
        else:
            at.append(at[last])
    return content


@FUZZ
@given(data=st.data())
def test_any_state_json(valid: Path, forged: Path, data: st.DataObject) -> None:
    restore(valid, forged)
    content = mutate(data.draw, json.loads((valid / "state.json").read_text()))
    (forged / "state.json").write_text(json.dumps(content))
    seal(forged)
    read(forged)
    look(forged)


@FUZZ
@given(data=st.data())
def test_any_manifest(valid: Path, forged: Path, data: st.DataObject) -> None:
    from titan_ckpt.format.manifest import digest_of

    restore(valid, forged)
    content = json.loads((valid / "manifest.json").read_text())
    del content["digest"]
    content = mutate(data.draw, content)
    if isinstance(content, dict):
        content = {**content, "digest": digest_of(content)}
    (forged / "manifest.json").write_text(json.dumps(content))
    found = read(forged)
    if found is not None:
        assert same_bits(found[0], TENSORS)
    look(forged)


@FUZZ
@given(data=st.data())
def test_any_header(valid: Path, forged: Path, data: st.DataObject) -> None:
    restore(valid, forged)
    header, body = split_file(valid)
    text = json.dumps(mutate(data.draw, header)).encode()
    length = data.draw(st.one_of(st.just(len(text)), st.integers(0, 2 * len(text)), st.integers(0, (1 << 64) - 1)))
    forge_file(text, body, length)(forged)
    read(forged)
    look(forged)
    try:
        tensors = read_all(SafetensorsFile(forged / DATA))
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(body)
