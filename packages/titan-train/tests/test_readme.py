"""The README's file, commands and Python, as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from titan_data.cli import main as titan_data_main
from titan_train import settings
from titan_train.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def write_files() -> None:
    for text in blocks("toml"):
        Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
    records = [{"text": f"{i} times {i} is {i * i}. " * 5} for i in range(50)]
    Path("corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    assert main(["--config", "mine.toml"]) == 0
    shown = capsys.readouterr().out
    assert "step 20/20" in shown
    for name in ("config.toml", "metrics.jsonl", "tensorboard", "checkpoints"):
        assert (tmp_path / "runs/mine" / name).exists()
    assert main(["--config", "mine.toml", "--training.steps", "22"]) == 0
    assert "step 20 of 22" in capsys.readouterr().out


@pytest.mark.slow
def test_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    (block,) = (block for block in blocks("sh") if "titan-data" in block)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert {"titan-data": titan_data_main, "titan-train": main}[program](arguments) == 0
    assert "mine, stdlib; tokenizer tokenizer.model" in capsys.readouterr().out
    (metrics,) = (json.loads(line) for line in Path("runs/mixed/metrics.jsonl").read_text().splitlines()[-1:])
    rows = {name: (n["tokens"] + n["padding"]) / 64 for name, n in metrics["sources"].items()}
    assert rows["mine"] + rows["stdlib"] == 15 * 4 + 5 * 8 == metrics["tokens"] / 64  # twice as long from step 15 on
    assert abs(rows["stdlib"] - 10) <= 2
    assert ["loss" in metrics["sources"][name] for name in ("mine", "stdlib")] == [True, False]  # since step 10


def test_commands_have_valid_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if "--config" in line]
    assert len(commands) == 6
    for words in commands:
        flags = words[words.index("--config") :]
        given = dict(zip(flags[::2], flags[1::2], strict=False))
        overrides = [(key[2:], value) for key, value in given.items() if "." in key]
        settings.load(given["--config"], overrides)


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/from-python/metrics.jsonl").exists()
