"""The [data] section: what comes out of it, and what is said when a resumed run has other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import titan_data
from titan_train.cli import main
from titan_train.errors import ExitCode
from train_cases import TINY


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources of text, a trained tokenizer, and token shards of one of them."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("squares", 150), ("cubes", 60)):
        records = [{"text": f"{name}: {i} gives {i**2 if name == 'squares' else i**3}. " * 4} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    squares = titan_data.load_files(folder / "squares.jsonl", name="squares")
    model = titan_data.train_tokenizer((squares[i] for i in range(150)), kind="sentencepiece", vocab_size=300)
    (folder / "tokenizer.model").write_bytes(model)
    titan_data.prepare(squares, titan_data.load_tokenizer(folder / "tokenizer.model"), folder / "shards", workers=0)
    return folder


def train(folder: Path, settings: dict[str, str], config: str = "debug") -> int:
    values = {**TINY, "model.vocab_size": "300", "run.folder": str(folder), "schedule.decay": "none", **settings}
    return main(["--config", config, *(word for key, value in values.items() for word in (f"--{key}", value))])


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def of_files(*files: Path, **more: str) -> dict[str, str]:
    found = {f"data.{key}": value for key, value in more.items()}
    return {"data.source": "files", "data.files": json.dumps([str(file) for file in files]), **found}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_token_shards_train_as_the_text_they_were_made_of(corpus: Path, tmp_path: Path, packing: str) -> None:
    tokenizer = {"data.tokenizer": str(corpus / "tokenizer.model"), "data.packing": packing}
    # Of one name, as the order of the documents is drawn from seed and name.
    shards, file = (json.dumps(str(corpus / name)) for name in ("shards", "squares.jsonl"))
    ready = {"data.sources": f'[{{name = "squares", source = "shards", path = {shards}}}]', "data.prefetch": "0"}
    text = {"data.sources": f'[{{name = "squares", source = "files", files = [{file}]}}]', "data.workers": "2"}
    assert train(tmp_path / "shards", {**tokenizer, **ready}) == ExitCode.DONE
    assert train(tmp_path / "text", {**tokenizer, **text}) == ExitCode.DONE
    curves = [[(m["step"], m["loss"]) for m in reports(tmp_path / name)] for name in ("shards", "text")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 10


def test_mixture_keeps_its_weights_and_stages(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mixed.toml"
    config.write_text(
        f"""
        [data]
        tokenizer = {json.dumps(str(corpus / "tokenizer.model"))}
        [[data.sources]]
        source = "shards"
        path = {json.dumps(str(corpus / "shards"))}
        name = "squares"
        weight = 0.75
        [[data.sources]]
        source = "files"
        files = [{json.dumps(str(corpus / "cubes.jsonl"))}]
        name = "cubes"
        weight = 0.25
        [[data.stages]]
        from_step = 6
        weights = {{cubes = 1.0}}
        """
    )
    assert train(tmp_path / "run", {}, str(config)) == ExitCode.DONE
    shown = " ".join(capsys.readouterr().out.split())  # long paths wrap
    assert "cubes, squares; tokenizer" in shown
    tokens = {m["step"]: {name: n["tokens"] for name, n in m["sources"].items()} for m in reports(tmp_path / "run")}
    assert tokens[6] == {"squares": 6 * 6 * 32, "cubes": 6 * 2 * 32}
    assert tokens[10] == {"squares": 6 * 6 * 32, "cubes": (6 * 2 + 4 * 8) * 32}


def test_changed_data_are_refused_until_allowed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text((corpus / "squares.jsonl").read_text())
    assert train(tmp_path / "run", of_files(file)) == ExitCode.DONE
    file.write_text((corpus / "cubes.jsonl").read_text() * 2)
    more = {**of_files(file), "training.steps": "12"}
    capsys.readouterr()
    assert train(tmp_path / "run", more) == ExitCode.FAILED
    shown = capsys.readouterr().err
    assert "edited: mine.jsonl" in shown
    assert "--data.allow_changes '[\"data\"]'" in shown
    assert "Traceback" not in shown
    assert train(tmp_path / "run", {**more, "data.allow_changes": '["data"]'}) == ExitCode.DONE
    assert reports(tmp_path / "run")[-1]["step"] == 12


def test_several_changes_make_one_flag(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = of_files(corpus / "squares.jsonl")
    assert train(tmp_path, text) == ExitCode.DONE
    others = {"training.steps": "11", "run.seed": "5", "data.packing": "concat", "data.allow_changes": "seed"}
    assert train(tmp_path, {**text, **others}) == ExitCode.FAILED
    assert '--data.allow_changes \'["packing", "seed"]\'' in capsys.readouterr().err
    assert train(tmp_path, {**text, **others, "data.allow_changes": '["packing", "seed"]'}) == ExitCode.DONE


def test_data_that_end_too_early_are_saved_and_said(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {**of_files(corpus / "cubes.jsonl", max_epochs="1"), "training.steps": "4000", "training.seq_len": "128"}
    assert train(tmp_path, few) == ExitCode.FAILED
    last = reports(tmp_path)[-1]["step"]
    shown = capsys.readouterr().err
    assert f"the data came to its end after step {last} of 4000, which is saved" in shown
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{last:08}"]
    assert train(tmp_path, {**few, "training.steps": f"{last}"}) == ExitCode.DONE


def test_vocabulary_beyond_the_model(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = {"data.tokenizer": str(corpus / "tokenizer.model"), "model.vocab_size": "299"}
    assert train(tmp_path / "run", {**of_files(tmp_path / "not-looked-for"), **tokenizer}) == ExitCode.BAD_CONFIG
    shown = capsys.readouterr().err
    assert "model.vocab_size 299 is less than the tokenizer's 300: set model.vocab_size = 300" in shown


def test_shards_of_another_tokenizer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready = {"data.source": "shards", "data.path": str(corpus / "shards")}
    assert train(tmp_path / "run", ready) == ExitCode.BAD_CONFIG
    assert "source 'shards' was made with tokenizer 'sentencepiece/" in capsys.readouterr().err
