"""The README's example runs as printed, its numbers are true, and importing the package is light."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import titan_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_code_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {"__name__": "readme"}
    printed = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
        printed.append(capsys.readouterr().out)
    training, saving, loading, experts = printed
    assert scope["losses"][-1] < scope["losses"][0] / 2
    assert f"{titan_model.count_parameters(titan_model.preset('debug')):,} parameters" in training
    assert saving.strip() == "['config.json', 'model.safetensors']"
    assert loading.splitlines() == ["True torch.bfloat16", "torch.Size([320, 256])"]
    assert "experts/max_load" in experts


@pytest.mark.slow
def test_the_trained_model_says_what_it_has_memorized(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)[0]
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), scope)
    tokens = scope["tokens"]
    assert str([tokens[0, 16:24].tolist(), tokens[1, 9:17].tolist()]) in capsys.readouterr().out


def test_every_public_name_is_listed() -> None:
    assert [name for name in titan_model.__all__ if f"`{name}`" not in README] == []
    assert [name for name in titan_model.__all__ if not hasattr(titan_model, name)] == []


def test_table_of_presets_is_true() -> None:
    rows = re.findall(r"^\| `(\w+)`( \(tied\))? \| ([\d,]+) \| ([\d,]+) \|$", README, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == titan_model.preset_names()
    for name, tied, parameters, context in rows:
        config = titan_model.preset(name)
        assert int(parameters.replace(",", "")) == titan_model.count_parameters(config)
        assert int(context.replace(",", "")) == config.max_seq_len
        assert bool(tied) == config.tied_embeddings


def test_flops_formula_is_the_code() -> None:
    config = titan_model.preset("llama3_8b")
    weights = titan_model.count_parameters(config) - config.vocab_size * config.dim - config.dim * 65
    assert "6 * W  +  6 * L * D * (S + 1)" in README
    assert titan_model.flops_per_token(config, 512) == 6 * weights + 6 * config.n_layers * config.dim * 513


def test_import_loads_neither_siblings_nor_transformers() -> None:
    code = (
        "import sys, titan_model; "
        "heavy = {'transformers', 'titan_data', 'titan_parallel', 'titan_ckpt', 'titan_train'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
