"""The reader in docs/checkpoint-format.md reads what was written, by those two libraries alone."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_sources import Tensors, read_all
from ckpt_states import Held, make_state
from parity import same_bits
from titan_ckpt import Checkpointer, open_checkpoint
from titan_ckpt.convert.titan_writer import write_titan

DOC = Path(__file__).parents[4] / "docs" / "checkpoint-format.md"


@pytest.fixture(scope="module")
def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.fixture(scope="module")
def read_checkpoint(example: str) -> Any:
    names: dict[str, Any] = {}
    exec(compile(example, str(DOC), "exec"), names)
    return names["read_checkpoint"]


def test_it_is_short_and_needs_two_libraries(example: str) -> None:
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"json", "safetensors"}


def test_it_reads_what_was_saved(tmp_path: Path, read_checkpoint: Any) -> None:
    state = make_state(7)
    state["odd"] = Held(scalar=torch.tensor(3), empty=torch.empty(0, 2), half=torch.ones(3).to(torch.bfloat16))
    Checkpointer(tmp_path).save(7, state)
    values, tensors = read_checkpoint(tmp_path / "step-00000007")
    with open_checkpoint(str(tmp_path / "step-00000007")) as checkpoint:
        assert same_bits(tensors, read_all(checkpoint))
    assert values["data"]["position"] == 7
    assert torch.equal(tensors["model/weight"], state["model"].state["weight"])


def test_it_puts_chunks_together(tmp_path: Path, read_checkpoint: Any) -> None:
    """A tensor in several chunks, as several ranks write it: here made of two files by hand."""
    whole = torch.arange(20.0).reshape(4, 5)
    write_titan(Tensors({"top": whole[:3], "rest": whole[3:]}), tmp_path, 1, file_bytes=1)
    path = tmp_path / "step-00000001/state.json"
    state = json.loads(path.read_text())
    top, rest = (state["tensors"].pop(name)["chunks"][0] for name in ("top", "rest"))
    rest["offsets"] = [3, 0]
    state["tensors"]["w"] = {"dtype": "float32", "shape": [4, 5], "chunks": [top, rest]}
    path.write_text(json.dumps(state))
    assert torch.equal(read_checkpoint(path.parent)[1]["w"], whole)
