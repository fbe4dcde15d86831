"""Forged checkpoints: refused with a message, whatever they say, and cheaply."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_forged import FORGED, refusal, use
from ckpt_hostile import greedy_pickles, make_checkpoint
from ckpt_memory import refuse_all, refused, write_greedy
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


@pytest.mark.parametrize("name", greedy_pickles())
@pytest.mark.parametrize("kind", ["torch", "dcp", "dcp value"])
def test_pickles_out_of_proportion_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    """They hold no bytes to speak of, and would take gigabytes, or hours."""
    assert refused(write_greedy(tmp_path, kind, greedy_pickles()[name]))


def test_a_file_that_is_a_hole_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + (1 << 40))
    for at, kind in ((path, None), (tmp_path, None), (path, "torch")):
        with pytest.raises(CheckpointError, match="bytes but occupies only"):
            open_source(at, kind)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "params.json"])
def test_every_json_has_a_limit(tmp_path: Path, name: str) -> None:
    if name == "params.json":
        torch.save({"w": torch.ones(1)}, tmp_path / "consolidated.00.pth")
    elif name == "config.json":
        save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    for content, reason in ((b" " * (1 << 27) + b"{}", "the limit for such a file is"), (deep(300), "deeper than 200")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            open_source(tmp_path, "meta" if name == "params.json" else "hf")


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"{}" + b"}" * levels


def test_tensors_that_share_their_bytes_a_thousand_times_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(1 << 18)
    torch.save({str(n): weight for n in range(1000)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="share the same data too often"):
        open_source(tmp_path / "x.pt")
    torch.save({str(n): weight for n in range(12)}, tmp_path / "shared.pt")  # as layers may
    assert len(open_source(tmp_path / "shared.pt").tensors) == 12


@pytest.mark.slow
def test_none_of_them_takes_memory(tmp_path: Path) -> None:
    """All at once, in a process that can take no more than a gibibyte, and takes much less."""
    assert run_alone(refuse_all, tmp_path, timeout=300) < 200 << 20


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
