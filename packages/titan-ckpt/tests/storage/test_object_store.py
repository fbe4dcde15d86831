import json
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest

from ckpt_states import blank_state, holds_step, make_state
from ckpt_stores import FailingFileSystem, Outage, s3_server
from titan_ckpt import Checkpointer, CheckpointError, list_checkpoints, open_checkpoint, pin, verify
from titan_ckpt.format.manifest import MANIFEST
from titan_ckpt.storage import object_store
from titan_ckpt.storage.open import open_storage, parent_and_name


@pytest.fixture(scope="module")
def s3() -> Iterator[Outage]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3_server() as (address, outage):
        settings = {"endpoint_url": address, "key": "k", "secret": "s", "client_kwargs": {"region_name": "eu-west-1"}}
        fsspec.config.conf["s3"] = settings
        fsspec.filesystem("s3").mkdir("bucket")
        yield outage
        del fsspec.config.conf["s3"]


@pytest.fixture(params=["memory", "s3"])
def folder(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{uuid.uuid4()}/checkpoints"
    return f"memory://{uuid.uuid4()}/checkpoints"


def keys(folder: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(folder)
    fs.invalidate_cache()
    return sorted(str(path).partition("checkpoints/")[2] for path in fs.find(root))


def change(folder: str, key: str, content: bytes) -> None:
    fs, root = fsspec.core.url_to_fs(folder)
    fs.pipe_file(f"{root}/{key}", content)


def content_of(folder: str, key: str) -> bytes:
    fs, root = fsspec.core.url_to_fs(folder)
    return bytes(fs.cat_file(f"{root}/{key}"))


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_on_a_store(folder: str, asynchronous: bool) -> None:
    ckpt = Checkpointer(folder, keep_last=2, asynchronous=asynchronous)
    assert ckpt.load(blank_state()) is None
    for step in (1, 2, 3):
        ckpt.save(step, make_state(step), {"note": step})
    ckpt.wait()
    pin(folder, 2, "good")
    ckpt.save(4, make_state(4))
    ckpt.save(5, make_state(5))
    ckpt.close()
    assert [info.step for info in list_checkpoints(folder)] == [2, 4, 5]
    state = blank_state()
    found = Checkpointer(folder).load(state, step=2)
    assert found is not None
    assert found.metadata == {"note": 2}
    assert holds_step(state, 2)
    assert verify(found.path, level="checksum") == []
    w = make_state(2)["model"].state["weight"][99, 298:].tolist()
    with open_checkpoint(found.path) as opened:
        assert opened.read_slice("model/weight", (99, 298), (1, 2)).tolist() == [[w[0], w[1]]]
    names = {key.split("/")[0] for key in keys(folder)}
    assert names == {"latest", "pins", "step-00000002", "step-00000004", "step-00000005"}
    assert content_of(folder, "latest") == b"step-00000005\n"


def test_corruption_on_a_store(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    ckpt = Checkpointer(folder)
    for step in (1, 2):
        ckpt.save(step, make_state(step))
    (key,) = [key for key in keys(folder) if key.startswith("step-00000002") and key.endswith(".safetensors")]
    content = bytearray(content_of(folder, key))
    content[len(content) // 2] ^= 1
    change(folder, key, bytes(content))
    assert "in the tensor model/weight" in "".join(verify(f"{folder}/step-00000002", level="checksum"))
    state = blank_state()
    with caplog.at_level(logging.WARNING):
        found = ckpt.load(state)
    assert found is not None
    assert found.step == 1
    assert holds_step(state, 1)
    ckpt.save(2, make_state(2))  # the corrupt one is set aside
    found = ckpt.load(state)
    assert found is not None
    assert found.step == 2
    assert any(key.startswith(".aside-step-00000002-") for key in keys(folder))
    ckpt.close()


def test_a_step_without_a_manifest_is_deleted_by_the_next_save(folder: str) -> None:
    ckpt = Checkpointer(folder)
    ckpt.save(1, make_state(1))
    change(folder, "step-00000002/0123abcd/tensors-00000-of-00001.safetensors", b"half")
    assert [info.step for info in list_checkpoints(folder)] == [1]
    state = blank_state()
    found = ckpt.load(state)
    assert found is not None
    assert found.step == 1
    ckpt.save(3, make_state(3))
    assert not [key for key in keys(folder) if key.startswith("step-00000002")]
    ckpt.close()


def test_a_first_save_that_was_killed_does_not_matter(folder: str) -> None:
    change(folder, "step-00000001/0123abcd/tensors-00000-of-00001.safetensors", b"half")
    ckpt = Checkpointer(folder)
    assert ckpt.load(blank_state()) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* to resume from"):
        ckpt.load(blank_state(), required=True)
    ckpt.save(1, make_state(1))
    state = blank_state()
    ckpt.load(state)
    assert holds_step(state, 1)
    ckpt.close()
    assert not [key for key in keys(folder) if "0123abcd" in key or key.startswith(".")]


def test_the_manifest_is_written_after_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    fs = fsspec.filesystem("memory")
    folder = f"memory://{uuid.uuid4()}/checkpoints"
    pipe, opened = type(fs).pipe_file, type(fs).open

    def pipe_file(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        written.append(path)
        return pipe(self, path, *args, **kwargs)

    def open_file(self: Any, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            written.append(path)
        return opened(self, path, mode, *args, **kwargs)

    monkeypatch.setattr(type(fs), "pipe_file", pipe_file)
    monkeypatch.setattr(type(fs), "open", open_file)
    Checkpointer(folder).save(1, make_state(1))
    ends = list(dict.fromkeys(path.rpartition("/")[2] for path in written))  # memory's pipe_file opens, too
    assert ends[-2:] == [MANIFEST, "latest"]
    assert ends.index("state.json") < ends.index(MANIFEST)
    assert ends.index("tensors-00000-of-00001.safetensors") < ends.index(MANIFEST)


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_store_that_fails_at_any_call(asynchronous: bool) -> None:
    """Whichever call of a save fails, the save is complete or it raises, and the next one is clean."""
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    outcomes = []
    for instant in range(500):
        FailingFileSystem.store.clear()
        FailingFileSystem.fails_at = None
        folder = f"failing://{uuid.uuid4()}/checkpoints"
        ckpt = Checkpointer(folder, keep_last=2, asynchronous=asynchronous)
        for step in (1, 2):
            ckpt.save(step, make_state(step))
        ckpt.wait()
        FailingFileSystem.calls, FailingFileSystem.fails_at = 0, instant
        message = message_of(lambda ckpt=ckpt: (ckpt.save(3, make_state(3)), ckpt.wait()))
        failed = bool(message)
        assert not message or "the store does not answer" in message
        happened = FailingFileSystem.fails_at is None
        FailingFileSystem.fails_at = None
        state = blank_state()
        found = ckpt.load(state)
        assert found is not None
        assert holds_step(state, found.step)
        assert found.step == (2 if failed else 3), instant
        ckpt.save(4, make_state(4))
        ckpt.wait()
        assert {info.step for info in list_checkpoints(folder)} >= {found.step, 4}
        tops = {key.split("/")[0] for key in keys(folder)}
        assert tops <= {"latest", ".lock", "step-00000001", "step-00000002", "step-00000003", "step-00000004"}, instant
        assert all(f"{top}/manifest.json" in keys(folder) for top in tops if top.startswith("step-"))
        ckpt.close()
        outcomes.append(failed)
        if not happened:
            break
    assert not outcomes[-1]
    assert outcomes.count(True) > 5
    assert outcomes.count(False) > 5


@pytest.mark.slow
def test_an_outage_of_s3(s3: Outage) -> None:
    folder = f"s3://bucket/{uuid.uuid4()}/checkpoints"
    ckpt = Checkpointer(folder)
    ckpt.save(1, make_state(1))
    before = s3.requests
    ckpt.save(2, make_state(2))
    length = s3.requests - before
    failures = 0
    for step, share in enumerate((0.0, 0.2, 0.4, 0.6, 0.8), 3):
        s3.begins_at = s3.requests + int(share * length)
        try:
            ckpt.save(step, make_state(step))
        except CheckpointError:
            failures += 1
        s3.begins_at = None
        state = blank_state()
        found = ckpt.load(state)
        assert found is not None
        assert holds_step(state, found.step)
    assert failures > 0
    ckpt.save(9, make_state(9))
    ckpt.close()
    for info in list_checkpoints(folder):
        assert verify(info.path, level="checksum") == []


def test_paths_and_urls_are_split() -> None:
    assert parent_and_name("a/b/step-00000001/") == ("a/b", "step-00000001")
    assert parent_and_name("step-00000001") == (".", "step-00000001")
    assert parent_and_name("/step-00000001") == ("/", "step-00000001")
    assert parent_and_name("memory://step-00000001") == ("memory://", "step-00000001")
    assert parent_and_name("s3://bucket/step-00000001") == ("s3://bucket", "step-00000001")
    assert open_storage("file:///a/b").url == "/a/b"


def test_the_lock_on_a_store(folder: str) -> None:
    first, second = Checkpointer(folder), Checkpointer(folder)
    first.acquire_lock()
    assert json.loads(content_of(folder, ".lock"))["host"]
    with pytest.raises(CheckpointError, match="close"):
        second.acquire_lock()
    first.close()
    second.acquire_lock()
    second.close()
    assert keys(folder) == []


def test_nothing_is_published_over_a_checkpoint(folder: str) -> None:
    storage = open_storage(folder)
    first, second = storage.begin("step-00000001"), storage.begin("step-00000001")
    storage.publish(first, b"first")
    with pytest.raises(FileExistsError):
        storage.publish(second, b"second")
    storage.abort(second)
    assert content_of(folder, "step-00000001/manifest.json") == b"first"


def test_a_large_buffer_reaches_the_client_in_parts() -> None:
    """The client copies what it is given: of a whole state it would make a second one."""

    class Client:
        def __init__(self) -> None:
            self.got: list[bytes] = []

        def write(self, content: memoryview) -> None:
            self.got.append(bytes(content))

    client = Client()
    content = bytes(range(256)) * (20 << 12)
    object_store._Sink(client).write(content)
    assert b"".join(client.got) == content
    assert [len(part) >> 20 for part in client.got] == [8, 8, 4]
