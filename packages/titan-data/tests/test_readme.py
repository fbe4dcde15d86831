"""The README's examples and commands run as printed, and importing the package is light."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import titan_data
from titan_data.cli import main
from titan_data.sources import stdlib

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, as later blocks use what earlier ones made; with a part of the standard library."""
    monkeypatch.chdir(tmp_path)
    list_files = stdlib._list_files
    monkeypatch.setattr(stdlib, "_list_files", lambda root: list_files(root)[:80])
    found = re.findall(
        r"^```(python|sh)\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    assert {kind for kind, _ in found} == {"python", "sh"}
    scope = {"__name__": "readme"}
    for kind, block in found:
        if kind == "python":
            exec(compile(block, str(README), "exec"), scope)
        for line in block.splitlines() if kind == "sh" else []:
            program, *arguments = shlex.split(line)
            assert (program, main(arguments)) == ("titan-data", 0)
    printed = capsys.readouterr().out
    assert "two ranks continue with the same tokens" in printed
    assert "data of source 'notes': edited: document 1\n  data of source 'notes': added: document 2" in printed
    assert "allow_changes={'data'}" in printed
    assert "tokens/stdlib: all files are valid" in printed
    assert "300 documents" in printed
    counts = scope["loader"].accounting()
    tokens = {name: count["tokens"] for name, count in counts.items()}
    for name, weight in (("code", 0.7), ("web", 0.2), ("books", 0.1)):
        assert abs(tokens[name] - weight * sum(tokens.values())) < 512, "the shares that the README promises"


def test_readme_lists_every_public_name() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in titan_data.__all__ if f"`{name}`" not in text] == []


def test_import_loads_neither_datasets_nor_siblings() -> None:
    code = (
        "import sys, titan_data; "
        "heavy = {'datasets', 'pyarrow', 'tokenizers', 'tiktoken', 'sentencepiece', 'huggingface_hub', 'rich', "
        "'titan_model', 'titan_parallel', 'titan_ckpt', 'titan_train'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
