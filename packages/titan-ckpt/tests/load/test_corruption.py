import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_states import blank_state, flip_bit, holds_step, make_state
from titan_ckpt import Checkpointer, CheckpointError, list_checkpoints, verify
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.manifest import FORMAT_VERSION, digest_of

DATA = Path("tensors-00000-of-00001.safetensors")


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As one would who knows the format: with a digest that fits."""
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    change(content)
    (path / "manifest.json").write_text(json.dumps({**content, "digest": digest_of(content)}))


def hostile(name: str) -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        content["files"][name] = {"size": 1, "checksum": "00" * 16}

    return lambda path: rewrite_manifest(path, change)


def edit_manifest(**values: Any) -> Callable[[Path], None]:
    return lambda path: rewrite_manifest(path, lambda content: content.update(values))


def flip_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"created": "2', '"created": "1'))


def point_elsewhere(path: Path) -> None:
    """state.json, with a checksum that fits, sends the reader out of the folder."""
    state = json.loads((path / "state.json").read_text())
    state["tensors"]["model/weight"]["chunks"][0]["file"] = "../../secret"
    (path / "state.json").write_text(json.dumps(state))


CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit flipped in a tensor": (
        lambda path: flip_bit(path / DATA),
        "does not match its checksum in the tensor model/weight",
    ),
    "bit flipped in the other tensor": (
        lambda path: flip_bit(path / DATA, -1),
        "checksum in the tensor model/nested/bias",
    ),
    "bit flipped in a header": (lambda path: flip_bit(path / DATA, 9), "is not a valid safetensors file: its header"),
    "bit flipped in state.json": (lambda path: flip_bit(path / "state.json"), "state.json does not match its checksum"),
    "bit flipped in the manifest": (flip_manifest, "does not match its own digest"),
    "file cut short": (lambda path: os.truncate(path / DATA, 1000), f"{DATA} has 1000 bytes instead of"),
    "file empty": (lambda path: os.truncate(path / "state.json", 0), "state.json has 0 bytes instead of"),
    "file missing": (lambda path: (path / DATA).unlink(), f"{DATA} is missing"),
    "file longer": (lambda path: (path / DATA).open("ab").write(b"x") and None, "bytes instead of"),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "manifest cut short": (lambda path: os.truncate(path / "manifest.json", 60), "manifest.json cannot be read"),
    "manifest is a list": (lambda path: (path / "manifest.json").write_text("[]") and None, "cannot be read"),
    "manifest is not text": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00") and None, "cannot be read"),
    "format unknown": (
        edit_manifest(format_version=FORMAT_VERSION + 1),
        "has format version 2, this titan-ckpt reads 1",
    ),
    "field unknown": (edit_manifest(surprise=1), "cannot be read"),
    "step of another": (edit_manifest(step=1), "it is of step 1: was the directory renamed"),
    "algorithm unknown": (edit_manifest(checksum="md5"), "unknown checksum algorithm 'md5'"),
    "size absurd": (
        edit_manifest(files={"state.json": {"size": 2**62, "checksum": "0" * 32}}),
        "instead of 46116860184",
    ),
    "size no number": (
        edit_manifest(files={"state.json": {"size": 1.5, "checksum": "0" * 32}}),
        "invalid size or checksum",
    ),
    "absolute name": (hostile("/etc/passwd"), "names the file '/etc/passwd', which is not inside"),
    "name above": (hostile("tensors/../../x"), "which is not inside the checkpoint"),
    "name of a drive": (hostile("C:\\x"), "which is not inside the checkpoint"),
    "name empty": (hostile(""), "which is not inside the checkpoint"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ckpt = Checkpointer(tmp_path)
    for step in (1, 2):
        ckpt.save(step, make_state(step))
    return tmp_path


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_in_the_newest(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    corrupt, message = CORRUPTIONS[name]
    corrupt(folder / "step-00000002")
    assert message in "; ".join(verify(folder / "step-00000002", level="checksum"))

    ckpt, state = Checkpointer(folder), blank_state()
    with caplog.at_level(logging.WARNING):
        found = ckpt.load(state)
    assert found is not None
    assert found.step == 1
    assert holds_step(state, 1)
    assert "step-00000002 is corrupt, skipped" in caplog.text
    assert message in caplog.text
    assert (folder / "step-00000002").exists()

    with pytest.raises(CheckpointError) as error:
        ckpt.load(blank_state(), step=2)
    assert message in str(error.value)
    assert "step-00000001" in str(error.value)

    shutil.rmtree(folder / "step-00000001")
    with pytest.raises(CheckpointError, match="no valid checkpoint, only step-00000002"):
        ckpt.load(blank_state())


def test_no_byte_can_change_unnoticed(folder: Path) -> None:
    path = folder / "step-00000002"
    for name in ("manifest.json", "state.json", str(DATA)):
        whole = (path / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            if whole[at : at + 1].isspace() and name == "manifest.json":
                continue  # spaces between the JSON's words say nothing
            flip_bit(path / name, at)
            assert verify(path, level="checksum"), f"byte {at} of {name}"
            (path / name).write_bytes(whole)
    assert verify(path, level="checksum") == []


def test_a_reference_out_of_the_folder_is_not_followed(folder: Path) -> None:
    path = folder / "step-00000002"
    point_elsewhere(path)
    text = (path / "state.json").read_bytes()
    record = {"size": len(text), "checksum": checksum(text)}
    rewrite_manifest(path, lambda content: content["files"].update({"state.json": record}))
    with pytest.raises(CheckpointError, match=r"refers to '../../secret', which the manifest does not list"):
        Checkpointer(folder).load(blank_state(), step=2)


def test_the_size_level_reads_no_content(folder: Path) -> None:
    flip_bit(folder / "step-00000002" / DATA)
    assert verify(folder / "step-00000002") == []
    assert verify(folder / "step-00000002", level="checksum") != []
    with pytest.raises(CheckpointError, match="level must be"):
        verify(folder / "step-00000002", level="checksums")  # type: ignore[arg-type]


def test_an_absent_step_is_an_error(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it does not exist. The directory holds step-00000001, step-00000002"):
        Checkpointer(folder).load(blank_state(), step=3)
    with pytest.raises(CheckpointError, match=r"it does not exist. The directory holds no checkpoint"):
        Checkpointer(folder / "none").load(blank_state(), step=3)


def test_only_exact_names_are_checkpoints(tmp_path: Path) -> None:
    Checkpointer(tmp_path).save(5, make_state(5))
    for name in ("step-5", "step-000000005", "step-00000005.bak", "xstep-00000005", "step-" + "\u0665" * 8):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    assert [Path(info.path).name for info in list_checkpoints(tmp_path)] == ["step-00000005"]
    found = Checkpointer(tmp_path).load(blank_state())
    assert found is not None
    assert Path(found.path).name == "step-00000005"
    shutil.rmtree(tmp_path / "step-00000005")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint, only .*step-5"):
        Checkpointer(tmp_path).load(blank_state())


def test_saving_over_a_corrupt_step_moves_it_aside(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ckpt = Checkpointer(folder)
    ckpt.load(blank_state())
    flip_bit(folder / "step-00000002" / DATA)
    corrupt = (folder / "step-00000002" / DATA).read_bytes()
    ckpt.save(2, make_state(2))
    assert "was corrupt" in caplog.text
    (aside,) = folder.glob(".damaged-step-00000002-*")
    assert (aside / DATA).read_bytes() == corrupt
    state = blank_state()
    ckpt.load(state, step=2)
    assert holds_step(state, 2)
