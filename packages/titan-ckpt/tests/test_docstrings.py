"""The examples in docstrings run, in this order: each may use what the ones before it saved."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import titan_ckpt
from ckpt_states import Held

EXAMPLES = ("Checkpointer", "list_checkpoints", "open_checkpoint", "load_into")


def test_the_examples_in_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    save_file({"weight": torch.ones(1, 8), "bias": torch.zeros(1)}, tmp_path / "weights/model.safetensors")
    names: dict[str, Any] = {name: getattr(titan_ckpt, name) for name in titan_ckpt.__all__}
    names |= {"torch": torch, "state": {"model": torch.nn.Linear(8, 1), "progress": Held(step=100)}}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for name in EXAMPLES:
        (example, *_) = doctest.DocTestFinder(recurse=False).find(names[name], name, globs=names)
        assert example.examples, f"{name} has no example"
        runner.run(example, out=report.append)
        names |= example.globs  # what one example defines, the next may use
    assert runner.failures == 0, "".join(report)
