"""What torchtitan writes is read bit for bit, and it resumes from what is written for it.

torchtitan is not a dependency: `tools/isolated.py alone titan-ckpt` installs it beside the wheel and runs this.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import Ranks
from titan_ckpt import open_source
from titan_ckpt.cli import main

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.slow  # seconds to import, in each process

import ckpt_torchtitan  # noqa: E402 - it needs torchtitan


def different(left: dict[str, Any], right: dict[str, Any]) -> set[str]:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return bool(type(a) is type(b) and a == b)

    return (left.keys() ^ right.keys()) | {
        name for name in left.keys() & right.keys() if not equal(left[name], right[name])
    }


def content(path: Path) -> dict[str, Any]:
    source = open_source(path)
    assert source.values["dataloader"] == {"world_size": 2}  # and a pickle for each rank, which is never opened
    values = {
        f"{top}/{name}": value
        for top, part in source.values.items()
        for name, value in part.items()
        if top != "dataloader"
    }
    return {name: source.read(name) for name in source.tensors} | values


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_to_titan_and_back(
    ranks1: Ranks, ranks2: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], async_mode: str
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    saved = ranks2.run(ckpt_torchtitan.save, theirs, async_mode, timeout=120)[0]
    assert len(saved) > 700
    written = theirs / "checkpoint/step-2"
    assert different(content(written), saved) == set()

    assert main(["convert", str(written), str(ours), "--to", "titan", "--step", "2"]) == 0
    message = capsys.readouterr()
    assert "left out dataloader/dp_rank_1" in message.out + message.err
    assert different(content(ours / "step-00000002"), saved) == set()

    back = tmp_path / "back/checkpoint/step-2"
    back.parent.mkdir(parents=True)
    assert main(["convert", str(ours / "step-00000002"), str(back), "--to", "dcp"]) == 0
    for group in (ranks1, ranks2):
        for before, after in group.run(ckpt_torchtitan.resume, tmp_path / "back", timeout=120):
            assert len(different(before, saved)) > 190
            assert different(after, saved) == set()

    weights = ranks2.run(ckpt_torchtitan.load_weights, tmp_path / "none", written, timeout=120)[1]
    assert different(weights, {name: saved[name] for name in weights}) == set()
