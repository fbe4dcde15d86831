"""What is computed before a run is computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import titan_data
import titan_train.launch
from titan_train.check import check
from titan_train.cli import main
from titan_train.errors import ExitCode
from train_cases import TINY, tiny


@pytest.fixture
def loaded_tokenizers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokenizers that have been loaded in this process since the test began."""
    loaded: list[str] = []
    load = titan_data.load_tokenizer

    def counted(name: str, **options: Any) -> titan_data.Tokenizer:
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(titan_data, "load_tokenizer", counted)
    return loaded


def flags(folder: Path) -> list[str]:
    settings = {**TINY, "training.steps": "1", "run.folder": str(folder)}
    return ["--config", "debug", *(word for key, value in settings.items() for word in (f"--{key}", value))]


def test_a_rank_loads_its_tokenizer_once(tmp_path: Path, loaded_tokenizers: list[str]) -> None:
    assert main(flags(tmp_path)) == ExitCode.DONE
    assert loaded_tokenizers == ["bytes"]


def test_the_launcher_loads_it_at_most_once(
    tmp_path: Path, loaded_tokenizers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[int, list[str]]] = []

    def launch(processes: int, arguments: list[str]) -> int:
        launched.append((processes, arguments))
        return ExitCode.DONE

    monkeypatch.setattr(titan_train.launch, "launch", launch)
    assert main([*flags(tmp_path), "--nproc", "2"]) == ExitCode.DONE
    assert launched == [(2, flags(tmp_path))]
    assert len(loaded_tokenizers) <= 1


def test_checked_has_what_follows_from_the_settings() -> None:
    config = tiny(parallel__tp="2")
    checked = check(config, world_size=8)
    assert checked.config is config
    assert (checked.degrees.dp_shard, checked.degrees.tp) == (4, 2)
    assert checked.microbatch_size == 2
    assert checked.model_config.dim == 64
    assert checked.plan["blocks"]
    assert checked.tokenizer.vocab_size <= checked.model_config.vocab_size
