"""The README's file, commands and Python, as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from titan_train import settings
from titan_train.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (text,) = blocks("toml")
    Path("mine.toml").write_text(text)
    records = [{"text": f"{i} times {i} is {i * i}. " * 5} for i in range(50)]
    Path("corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["--config", "mine.toml"]) == 0
    shown = capsys.readouterr().out
    assert "step 20/20" in shown
    for name in ("config.toml", "metrics.jsonl", "tensorboard", "checkpoints"):
        assert (tmp_path / "runs/mine" / name).exists()
    assert main(["--config", "mine.toml", "--training.steps", "22"]) == 0
    assert "step 20 of 22" in capsys.readouterr().out


def test_commands_have_valid_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(blocks("toml")[0])
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if "--config" in line]
    assert len(commands) == 5
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
