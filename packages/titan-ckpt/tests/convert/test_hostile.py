"""Forged checkpoints: refused with a message, whatever they say, and cheaply."""

import os
import shutil
from pathlib import Path

import pytest

from ckpt_forged import FORGED, refusal, use
from ckpt_hostile import (
    make_checkpoint,
)
from ckpt_memory import refuse_all
from ranks import run_alone
from titan_ckpt import CheckpointError, open_source, verify


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("valid"))
    use(path)
    return path


@pytest.mark.parametrize("name", FORGED)
def test_forged_checkpoints_are_refused(valid: Path, tmp_path: Path, name: str) -> None:
    forge, expected = FORGED[name]
    path = Path(shutil.copytree(valid, tmp_path / valid.name))
    forge(path)
    message = refusal(path)
    assert any(part in message for part in expected.split("|")), message
    assert len(message) < 2000
    assert verify(str(path), "checksum") != []
    assert isinstance(verify(str(path)), list)


@pytest.mark.slow
def test_none_of_them_takes_memory(tmp_path: Path) -> None:
    """All at once, in a process that can take no more than a gibibyte, and takes much less."""
    assert run_alone(refuse_all, tmp_path) < 200 << 20


@pytest.mark.parametrize(
    ("kind", "name", "beside"),
    [
        ("dcp", ".metadata", {}),
        ("torch", "x.pt", {}),
        ("meta", "consolidated.00.pth", {}),
        ("meta", "params.json", {}),
        ("hf", "model.safetensors", {}),
        ("hf", "config.json", {}),
        ("hf", "model.safetensors.index.json", {}),
        ("hf", "a.safetensors", {"model.safetensors.index.json": '{"weight_map": {"w": "a.safetensors"}}'}),
        ("dcp-safetensors", "shard.safetensors", {}),
    ],
)
def test_pipes_are_refused_everywhere(tmp_path: Path, kind: str, name: str, beside: dict[str, str]) -> None:
    """Opening one blocks forever."""
    for other, content in beside.items():
        (tmp_path / other).write_text(content)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        open_source(str(tmp_path / name if kind == "torch" else tmp_path), kind)
