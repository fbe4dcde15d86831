"""Odd directories and files: one message, never a traceback; what is damaged but not needed is one warning."""

import contextlib
import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from ckpt_hostile import DATA, forge_file, seal, split_file
from ckpt_sources import Tensors, read_all
from ckpt_states import Held, make_state
from titan_ckpt import (
    Checkpointer,
    CheckpointError,
    KeepBest,
    Retention,
    list_checkpoints,
    open_checkpoint,
    open_source,
    pin,
    plan_prune,
    restore,
    unpin,
    verify,
)
from titan_ckpt.cli import main
from titan_ckpt.convert._assemble import assemble
from titan_ckpt.convert.source import Cast
from titan_ckpt.convert.titan_writer import write_titan
from titan_ckpt.errors import system_errors
from titan_ckpt.format.boxes import Box
from titan_ckpt.format.manifest import digest_of

ODD: list[Any] = [None, True, -1, 10**400, "x", [[0]], {"x": None}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON value but the outermost."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def with_another(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(content)
    at = changed
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return changed


def look(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Do everything that reads a checkpoint: a result or a CheckpointError, and no report of a mistake in titan."""
    with contextlib.suppress(CheckpointError), open_checkpoint(path) as checkpoint:
        read_all(checkpoint)
        assert checkpoint.values is not None
    with contextlib.suppress(CheckpointError):
        Checkpointer(path.parent).load({"model": Held(w=torch.zeros(3, 4)), "data": Held(position=1)}, strict=False)
    list_checkpoints(path.parent)
    plan_prune(path.parent, Retention(keep_last=1, keep_best=KeepBest("loss")))
    assert main(["ls", str(path.parent)]) == 0
    for arguments in (["show"], ["verify", "--quiet"]):
        assert main([*arguments, str(path)]) in (0, 1)
    assert "mistake" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("file", ["manifest.json", "state.json", "header"])
def test_wrong_types_in_every_field(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_titan(Tensors({"model/w": torch.ones(3, 4)}, {"data": {"position": 3}}), tmp_path, 1)
    path = tmp_path / "step-00000001"
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}
    content, body = split_file(path) if file == "header" else (json.loads(before[file]), b"")
    for place in list(places(content)):
        for value in ODD:
            changed = with_another(content, place, value)
            if file == "header":
                forge_file(json.dumps(changed).encode(), body)(path)
            elif file == "state.json":
                (path / file).write_text(json.dumps(changed))
                seal(path)
            else:
                del changed["digest"]
                (path / file).write_text(json.dumps({**changed, "digest": digest_of(changed)}))
            look(path, capsys)
            for name, data in before.items():
                (path / name).write_bytes(data)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "params.json"])
def test_wrong_types_in_the_files_of_others(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    kind = "meta" if file == "params.json" else "hf"
    for value in [*ODD, {"weight_map": None}, *({"weight_map": {"w": value}} for value in ODD)]:
        (tmp_path / file).write_text(json.dumps(value))
        for arguments in (["show"], ["show", "--json"]):
            assert main([*arguments, "--from", kind, str(tmp_path)]) in (0, 1)
    assert "mistake" not in capsys.readouterr().err


class Locked(MemoryFileSystem):
    """A store whose client has no credentials, and says so with an exception of its own."""

    protocol = "locked"

    def __getattribute__(self, name: str) -> Any:
        if name in ("ls", "info", "cat_file", "open", "pipe_file", "rm", "rm_file", "find", "makedirs"):
            return refuse
        return super().__getattribute__(name)


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise LookupError("Unable to locate credentials")


@pytest.fixture
def locked() -> str:
    fsspec.register_implementation("locked", Locked, clobber=True)
    return "locked://run/checkpoints"


def uses(url: str) -> list[Callable[[], Any]]:
    return [
        lambda: list_checkpoints(url),
        lambda: open_checkpoint(f"{url}/step-00000001"),
        lambda: open_source(f"{url}/step-00000001"),
        lambda: plan_prune(url, Retention(keep_last=1)),
        lambda: restore(url, 1),
        lambda: pin(url, 1, "x"),
        lambda: unpin(url, "x"),
        lambda: Checkpointer(url).load({}, step=1),
        lambda: Checkpointer(url).save(1, make_state(1)),
    ]


COMMANDS = [
    ["ls"],
    ["show"],
    ["verify"],
    ["prune", "--keep-last", "1"],
    ["restore", "@", "1"],
    ["pin", "@", "1", "x"],
    ["unpin", "@", "x"],
    ["diff", "@", "@"],
    ["convert", "@", "/nowhere/x", "--to", "torch"],
]


def command(arguments: list[str], url: str) -> list[str]:
    return [url if argument == "@" else argument for argument in arguments] + ([] if "@" in arguments else [url])


@pytest.mark.parametrize("which", range(len(uses(""))))
def test_a_store_without_credentials(locked: str, which: int) -> None:
    with pytest.raises(CheckpointError, match="Unable to locate credentials"):
        uses(locked)[which]()


@pytest.mark.parametrize("which", range(len(uses(""))))
def test_an_unknown_scheme(which: int) -> None:
    with pytest.raises(CheckpointError, match=r"nosuch://run: cannot be opened .*Protocol not known"):
        uses("nosuch://run")[which]()


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_commands_on_urls_that_do_not_work(
    locked: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for url, reason in ((locked, "credentials"), ("nosuch://run", "Protocol not known")):
        assert main(command(arguments, url)) == 1
        printed = capsys.readouterr()
        assert reason in printed.err + printed.out
        assert "mistake" not in printed.err


def test_a_permanent_damage_is_one_warning_and_nothing_leaks(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "pins/odd").mkdir(parents=True)
    (tmp_path / "pins/long").write_text("x" * 5000)
    (tmp_path / "pins/nothing").write_text("")
    (tmp_path / "latest").mkdir()
    (tmp_path / ".staging-step-00000001-0123abcd").mkdir()
    (tmp_path / ".writing-latest-0123abcd").touch()
    deleting = shutil.rmtree

    def refuse(path: Path, **options: Any) -> None:
        if "staging" in str(path):
            raise PermissionError("it is busy")
        deleting(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path, keep_last=2) as ckpt:
        for step in range(1, 5):
            caplog.clear()
            ckpt.save(step, make_state(step))
            texts = [record.message for record in caplog.records]
            assert all(len(text) < 500 for text in texts)
            about = [next(word for word in ("latest", "odd", "long", "nothing", "staging") if word in t) for t in texts]
            assert max(about.count(word) for word in about) <= 2  # `latest` is written, and read
    held = set(os.listdir(tmp_path))
    assert held == {
        "pins", "latest", ".staging-step-00000001-0123abcd", "step-00000003", "step-00000004",
    }  # fmt: skip
    assert main(["ls", "--json", str(tmp_path)]) == 0
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [3, 4]
    assert main(["prune", "--keep-last", "1", str(tmp_path)]) == 0
    assert [info.step for info in list_checkpoints(tmp_path)] == [4]


def test_a_pin_that_cannot_be_read_now_protects_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from titan_ckpt.storage.local import LocalStorage

    with Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, make_state(step))
    pin(tmp_path, 1, "mine")
    reading = LocalStorage.read

    def read(self: LocalStorage, path: str, most: int) -> bytes:
        if path == "pins/mine":
            raise PermissionError("not now")
        return reading(self, path, most)

    monkeypatch.setattr(LocalStorage, "read", read)
    assert main(["prune", "--keep-last", "1", str(tmp_path)]) == 1
    assert main(["ls", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "the pins cannot be read: PermissionError: not now" in printed.err
    assert [info.step for info in list_checkpoints(tmp_path)] == [1, 2]


EVIL = "\x1b[2J\x9b31m\u202e"


def test_everything_from_a_file_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"model": Held(**{f"w{EVIL}": torch.ones(1)})}, metadata={EVIL: EVIL})
    newest = tmp_path / "step-00000002"
    content = json.loads((newest / "manifest.json").read_text())
    content["files"][f"{EVIL}\ntitan-ckpt: all is well"] = content["files"].pop("state.json")
    (newest / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "latest").write_text(f"{EVIL}\n")
    (tmp_path / ".lock").write_text(json.dumps({"host": EVIL, "pid": EVIL, "since": EVIL}))
    with caplog.at_level(logging.INFO), pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path).load({"model": Held(v=torch.ones(1))})
    for arguments in (["ls"], ["show"], ["verify", "--quiet"], ["diff", "@", "@"]):
        main(command(arguments, str(newest if arguments != ["ls"] else tmp_path)))
        main(command(arguments, str(tmp_path / "step-00000001")))
    printed = capsys.readouterr()
    for text in (printed.out, printed.err, str(error.value), caplog.text):
        assert not set(EVIL) - set("[2J31m") & set(text)
        assert "\ntitan-ckpt: all is well" not in text
    assert "\\x1b" in str(error.value)


def test_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    with Checkpointer(tmp_path) as ckpt:
        odd = {"nan": float("nan"), "inf": float("inf"), "low": -float("inf"), "one": 1.0}
        ckpt.save(1, {"data": Held(**odd)}, metadata=odd, metrics=odd)
    assert main(["ls", "--json", str(tmp_path)]) == 0
    (entry,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert entry["metrics"] == {"nan": None, "inf": None, "low": None, "one": 1.0}
    assert main(["show", "--json", str(tmp_path / "step-00000001")]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["values"]["data"]["one"] == 1.0


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Checkpointer("~/run") as ckpt:
        ckpt.save(1, {"model": Held(w=torch.ones(1))})
    assert [info.step for info in list_checkpoints("~/run")] == [1]
    assert verify("~/run/step-00000001") == []
    with open_checkpoint("~/run/step-00000001") as checkpoint:
        assert checkpoint.read("model/w") == 1
    assert main(["convert", "~/run/step-00000001", "~/hf", "--to", "hf"]) == 0
    assert main(["convert", "~/run/step-00000001", "~/w.pt", "--to", "torch"]) == 0
    assert main(["verify", "--quiet", "~/run/step-00000001"]) == 0
    assert main(["diff", "~/hf", "~/w.pt"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["hf", "run", "w.pt"]


def test_what_is_damaged_is_listed_and_prunable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, make_state(1))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".damaged-step-00000001-0123abcd")
    (tmp_path / ".damaged-step-00000002-0123abcd").mkdir()
    (tmp_path / ".damaged-step-00000003-0123abcd").touch()
    assert main(["ls", "--json", str(tmp_path)]) == 0
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [1, 1, 2, 3]
    assert main(["prune", "--set-aside", str(tmp_path)]) == 0
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_tensors_larger_than_memory_are_one_message() -> None:
    large = Tensors({"w": torch.ones(1).expand(1 << 46)})
    for attempt in (
        lambda: assemble(torch.float32, Box((0,), (1 << 46,)), [], lambda which, box: torch.ones(1)),
        lambda: Cast(large, torch.float64).read("w"),
    ):
        with pytest.raises(CheckpointError, match="does not fit into this machine's memory"):
            attempt()


def test_every_refusal_has_a_reason() -> None:
    with pytest.raises(CheckpointError, match=r"could not read it: OSError$"), system_errors("read it"):
        raise OSError
    with pytest.raises(ValueError, match="other"), system_errors("read it"):
        raise ValueError("other")


def test_a_mistake_of_titan_is_reported_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(directory: str) -> None:
        raise ZeroDivisionError("x")

    (tmp_path / DATA).touch()
    monkeypatch.setattr("titan_ckpt.cli.ls.open_storage", fail)
    assert main(["ls", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "unexpected error in fail" in printed
    assert "Traceback" not in printed
