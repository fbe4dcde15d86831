import re
import shlex
from pathlib import Path

import pytest

from titan_ckpt.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # in the order of the README
    assert "the resumed run has the same losses" in capsys.readouterr().out
    (commands,) = re.findall(r"```console\n(.*?)```", README.read_text(), flags=re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "titan-ckpt"
        assert main(arguments) == 0, command


def test_the_names_it_lists_are_the_public_ones() -> None:
    import titan_ckpt

    assert set(dir(titan_ckpt)) >= set(titan_ckpt.__all__)
    assert not hasattr(titan_ckpt, "Nothing")
    for name in titan_ckpt.__all__:
        assert getattr(titan_ckpt, name).__module__.startswith("titan_ckpt.")
    listed = set(re.findall(r"^\| `([A-Za-z_]+)", README.read_text(), flags=re.MULTILINE))
    assert listed == set(titan_ckpt.__all__)
