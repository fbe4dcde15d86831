"""The [data] section: the batches of each kind of source, errors, and resuming with other data."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import titan_data
import titan_model
from ranks import Ranks
from titan_model import LossSums
from titan_train import load
from titan_train.check import check, model_config
from titan_train.cli import main
from titan_train.config import Config
from titan_train.data import load_tokenizer, open_loader
from titan_train.errors import ConfigError, ExitCode
from titan_train.source_loss import SourceLosses
from train_cases import TINY, run_here


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


@pytest.mark.parametrize("packing", ["concat", pytest.param("best_fit", marks=pytest.mark.slow)])
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


def test_mixture_keeps_its_weights_and_phases(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mixed.toml"
    config.write_text(
        f"""
        [data]
        tokenizer = {json.dumps(str(corpus / "tokenizer.model"))}
        [[data.sources]]
        source = "shards"
        path = [{json.dumps(str(corpus / "shards"))}]
        name = "squares"
        weight = 0.75
        [[data.sources]]
        source = "files"
        files = [{json.dumps(str(corpus / "cubes.jsonl"))}]
        name = "cubes"
        weight = 0.25
        [[data.phases]]
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


def mixed(corpus: Path, **more: str) -> dict[str, str]:
    """Settings of a mixture whose sources are very different, packed with padding."""
    files = {name: json.dumps([str(corpus / f"{name}.jsonl")]) for name in ("squares", "cubes")}
    tables = ", ".join(
        f'{{name = "{name}", source = "files", files = {files[name]}, weight = {weight}}}'
        for name, weight in (("squares", 0.7), ("cubes", 0.3))
    )
    settings = {
        "data.sources": f'[{tables}, {{name = "later", weight = 0.0}}]',
        "data.packing": "best_fit",
        "data.packing_window": "8",
        "data.long_documents": "crop",
        "training.seq_len": "64",
    }
    return {"data.prefetch": "0", "schedule.decay": "none", "model.vocab_size": "300", **settings, **more}


def tiny_config(settings: dict[str, str]) -> Config:
    return load("debug", [*{**TINY, **settings}.items()]).config


def batches(config: Config) -> list[titan_data.Batch]:
    """The run's global batches, read by one process."""
    loader = open_loader(config, load_tokenizer(config.data), HERE, pin_memory=False)
    with closing(loader):
        return [next(loader) for _ in range(config.training.steps)]


def losses_by_hand(config: Config, these: list[titan_data.Batch]) -> dict[str, float]:
    """The mean loss of each source over some batches with the initial weights: by torch's own cross-entropy."""
    shape = model_config(config)
    model = titan_model.build(shape, "cpu")
    titan_model.init_parameters(model.named_parameters(), shape, config.run.seed)
    sums: Counter[str] = Counter()
    scored: Counter[str] = Counter()
    for batch in these:
        for row, name in enumerate(batch["sources"]):
            with torch.no_grad():
                logits = model(batch["tokens"][row : row + 1])[0]
            labels = batch["labels"][row]
            sums[name] += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            scored[name] += int((labels != -100).sum())
    return {name: total / scored[name] for name, total in sums.items()}


HERE = SimpleNamespace(dp_rank=0, dp_world_size=1)
STILL = {"optimizer.lr": "1e-30", "training.steps": "5", "metrics.log_interval": "3"}  # reported: 1, 2 + 3, 4 + 5


@pytest.mark.parametrize(
    ("group", "layout"),
    [
        ("ranks1", {}),
        pytest.param("ranks2", {"training.microbatch_size": "2"}, marks=pytest.mark.slow),
        ("ranks2", {"parallel.tp": "2"}),
        pytest.param(
            "ranks4",
            {"parallel.dp_replicate": "2", "parallel.dp_shard": "2", "training.microbatch_size": "1"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ranks1", "accumulation", "tp", "hsdp"],
)
def test_loss_by_source_is_that_of_its_tokens_on_any_layout(
    group: str, layout: dict[str, str], corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue(group)
    config = tiny_config({**mixed(corpus, **STILL), **layout, "run.folder": str(tmp_path)})
    for reported in ranks.run(run_here, config):
        assert [*reported["sources"]] == [1, 3, 5]
        for step, first in ((1, 0), (3, 1), (5, 3)):
            expected = losses_by_hand(config, batches(config)[first:step])
            found = {name: n["loss"] for name, n in reported["sources"][step].items() if "loss" in n}
            assert found == pytest.approx(expected, rel=2e-6)
            assert found.keys() == {"squares", "cubes"}
            assert abs(found["squares"] - found["cubes"]) > 1e-3, "the test should tell the sources apart"


def test_loss_by_source_does_not_wait_for_the_device_before_a_report() -> None:
    by_source = SourceLosses(["a", "b"], torch.device("meta"))  # where whatever waits for a value fails
    sums = LossSums(*(torch.ones(shape, device="meta") for shape in ((), 2, (), 2)))
    assert by_source.add(sums, None) is sums.total
    with pytest.raises((NotImplementedError, RuntimeError)):
        by_source.take(lambda values: values)


def test_one_source_has_the_loss_of_the_run(corpus: Path, tmp_path: Path) -> None:
    assert train(tmp_path, of_files(corpus / "squares.jsonl")) == ExitCode.DONE
    assert all("loss" not in m["sources"]["squares.jsonl"] for m in reports(tmp_path))


@pytest.mark.slow
def test_sequences_become_longer_at_their_step_on_any_number_of_ranks(
    corpus: Path, tmp_path: Path, ranks1: Ranks, ranks2: Ranks, ranks4: Ranks
) -> None:
    """Without a stop on one rank, and stopped at one change and after the other, with other ranks and layouts."""
    phases = "[{from_step = 3, seq_len = 96}, {from_step = 5, seq_len = 32, weights = {cubes = 1.0}}]"
    settings = mixed(corpus, **{"data.phases": phases, "training.steps": "7"})

    def part(group: Ranks, folder: str, steps: int, **layout: str) -> dict[str, Any]:
        more = {"training.steps": str(steps), "run.folder": str(tmp_path / folder)}
        config = tiny_config({**settings, **more, **{key.replace("__", "."): v for key, v in layout.items()}})
        found: dict[str, Any] = group.run(run_here, config)[0]
        return found

    unbroken = part(ranks1, "unbroken", 7)
    parts = [
        part(ranks4, "parts", 3, parallel__dp_shard="2", parallel__tp="2"),
        part(ranks1, "parts", 6, training__microbatch_size="4"),
        part(ranks2, "parts", 7),
    ]
    losses = {step: loss for found in parts for step, loss in found["losses"].items()}
    assert losses == pytest.approx(unbroken["losses"], abs=2e-5)
    assert [found["resumed"] for found in parts] == [None, 3, 6]
    counts = [{step: value for found in parts for step, value in found[key].items()} for key in ("tokens", "sources")]
    per_step = [8 * 64] * 3 + [8 * 96] * 2 + [8 * 32] * 2
    assert counts[0] == unbroken["tokens"] == {step: sum(per_step[:step]) for step in range(1, 8)}
    for step, sources in unbroken["sources"].items():
        for name, numbers in sources.items():
            assert counts[1][step][name] == pytest.approx(numbers, abs=2e-5)


def test_a_new_sequence_length_is_printed_and_its_tokens_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = {"data.phases": "[{from_step = 4, seq_len = 128}]"}
    assert train(tmp_path, phases) == ExitCode.DONE
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 x 32 tokens per step, 8 x 128 after step 4" in shown
    assert f"done: {8 * (4 * 32 + 6 * 128):,} tokens in" in shown
    assert reports(tmp_path)[-1]["tokens"] == 8 * (4 * 32 + 6 * 128)
    assert reports(tmp_path)[-1]["mfu"] > 0


def test_raw_and_megatron_tokens_train_like_token_shards(corpus: Path, tmp_path: Path) -> None:
    """The ids of the token shards, written as nanoGPT and as Megatron-LM write them, give the same run."""
    shards = titan_data.TokenShards(corpus / "shards")
    documents = [np.asarray(shards[i], dtype=np.uint16) for i in range(len(shards))]
    tokenizer = titan_data.load_tokenizer(corpus / "tokenizer.model")
    np.concatenate(documents).tofile(tmp_path / "train.bin")
    write_megatron(tmp_path / "mega", documents)
    kinds = {
        "shards": f"path = {json.dumps(str(corpus / 'shards'))}",
        "raw": f'files = ["{tmp_path}/train.bin"], dtype = "uint16", eos_id = {tokenizer.eos_id}',
        "megatron": f"path = {json.dumps(str(tmp_path / 'mega.bin'))}",
    }
    curves = []
    for kind, where in kinds.items():
        source = f'[{{name = "squares", source = "{kind}", {where}}}]'
        settings = {"data.tokenizer": str(corpus / "tokenizer.model"), "data.sources": source}
        assert train(tmp_path / kind, {**settings, "data.packing": "concat", "training.steps": "4"}) == ExitCode.DONE
        curves.append([m["loss"] for m in reports(tmp_path / kind)])
    assert curves[0] == curves[1] == curves[2]


def test_markers_nested_keys_and_unreadable_files(corpus: Path, tmp_path: Path) -> None:
    nested, other = tmp_path / "nested.jsonl", tmp_path / "other.jsonl"
    nested.write_text("".join(json.dumps({"meta": {"text": f"nested {i} </s>"}}) + "\n" for i in range(50)))
    other.write_text(json.dumps({"content": "x"}) + "\n")
    settings = of_files(
        nested,
        text_key="meta.text",
        bos="none",
        eos="</s>",
        tokenizer=str(corpus / "tokenizer.model"),
        packing="concat",  # no padding, which looks like eos
    )
    assert train(tmp_path / "run", {**settings, "training.steps": "2"}) == ExitCode.DONE
    tokenizer = titan_data.load_tokenizer(corpus / "tokenizer.model")
    tokens = np.concatenate([batch["tokens"].flatten() for batch in batches(tiny_config(settings))]).tolist()
    assert tokenizer.bos_id not in tokens
    # Once for each document: the name in the text is text.
    assert abs(tokens.count(tokenizer.eos_id) * len(tokenizer.encode("nested 12 </s>")) - len(tokens)) < len(tokens) / 4
    both = of_files(nested, other, text_key="meta.text")
    batches(tiny_config(both))  # with a warning
    with pytest.raises(ConfigError, match=r"1 of 2 files cannot be read: .*\n.*other\.jsonl has no 'meta\.text'"):
        batches(tiny_config({**both, "data.on_unreadable_file": "raise"}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: eos names '</nope>' as eos"):
        batches(tiny_config({**settings, "data.eos": "</nope>"}))


def test_documents_that_begin_with_a_marker_and_checked_shards(corpus: Path, tmp_path: Path) -> None:
    np.array([7, 1, 2, 3, 7, 4, 5] * 200, np.uint16).tofile(tmp_path / "a.bin")
    raw = {"data.source": "raw", "data.files": f'["{tmp_path}/a.bin"]', "data.dtype": "uint16", "data.bos_id": "7"}
    raw["data.packing"] = "concat"
    assert train(tmp_path / "run", {**raw, "training.steps": "2"}) == ExitCode.DONE
    for batch in batches(tiny_config(raw)):
        starts = (batch["positions"] == 0)[:, 1:]  # a row may begin within a document
        assert set(batch["tokens"][:, 1:][starts].tolist()) == {7}
    shutil.copytree(corpus / "shards", tmp_path / "shards")
    (shard,) = (tmp_path / "shards").glob("*.tokens")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    checked = {"data.source": "shards", "data.path": str(tmp_path / "shards"), "data.verify": "true"}
    with pytest.raises(titan_data.DataError, match="the checksum does not match"):
        batches(tiny_config({**checked, "data.tokenizer": str(corpus / "tokenizer.model"), "data.prefetch": "0"}))


def test_settings_of_rank_files(tmp_path: Path) -> None:
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "own.tiktoken").write_bytes(ranks)
    settings = {"data.tokenizer": str(tmp_path / "own.tiktoken")}
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* is not one of the known files of tiktoken ranks"):
        load_tokenizer(tiny_config(settings).data)
    chosen = load_tokenizer(tiny_config({**settings, "data.encoding": "qwen", "data.match_added_tokens": "true"}).data)
    assert chosen.eos_id == 151643


def write_megatron(prefix: Path, documents: list[np.ndarray[Any, np.dtype[np.uint16]]]) -> None:
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]]) * 2
    with prefix.with_suffix(".idx").open("wb") as idx:
        idx.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(documents), len(documents) + 1))
        idx.write(np.array(lengths, dtype="<i4").tobytes() + starts.astype("<i8").tobytes())
        idx.write(np.arange(len(documents) + 1, dtype="<i8").tobytes())
    np.concatenate(documents).tofile(prefix.with_suffix(".bin"))


def test_ranks_of_one_machine_share_their_tokens(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = []
    for ranks, share in (("1", "true"), ("2", "false"), ("2", "true")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        config = tiny_config({**mixed(corpus), "data.share_tokenizing": share})
        with closing(open_loader(config, load_tokenizer(config.data), HERE, pin_memory=False)) as loader:
            next(loader)
            found.append(len(list(tmp_path.glob("titan-data-*/*.ids"))))
    assert found[:2] == [0, 0]
    assert found[2] > 0


def test_files_by_format_options_and_index_directory(corpus: Path, tmp_path: Path) -> None:
    odd = tmp_path / "squares.data"
    odd.write_text((corpus / "squares.jsonl").read_text())
    settings = of_files(
        odd, format="jsonl", index_directory=str(tmp_path / "index"), storage_options="{auto_mkdir = true}"
    )
    assert train(tmp_path / "run", {**settings, "training.steps": "2"}) == ExitCode.DONE
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".npy"]
    config = json.dumps(str(tmp_path / "run" / "config.toml"))
    assert load(json.loads(config)).config.data.source.storage_options == {"auto_mkdir": True}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": "raw", "files": "x.bin"}, 'source "raw" needs dtype: data type of the ids'),
        ({"source": "megatron"}, 'source "megatron" needs path: the .bin'),
        ({"eos_id": "0"}, '--data.eos_id: not a setting of source "stdlib", but of "raw"'),
        ({"storage_options": "{anon = true}"}, 'storage_options: not a setting of source "stdlib", but of "files"'),
        (
            {"source": "files", "files": "x", "storage_options": "3"},
            "--data.storage_options is 3: expected table of text or int or float or true",
        ),
        ({"source": "raw", "files": "x", "dtype": "int8"}, "--data.dtype is 'int8': expected one of uint16, uint32"),
        ({"packing": "concat", "long_documents": "crop"}, 'long_documents: packing "concat" never crops'),
        ({"phases": "[{from_step = 1}]"}, "phases, table 1: nothing changes: set weights or seq_len"),
        ({"sources": '[{weight = 1.0}, {source = "raw"}]'}, '[data.sources], table 2: source "raw" needs files'),
        ({"source": "files", "files": "gone.jsonl"}, "data, source 'files': file gone.jsonl does not exist"),
        ({"source": "raw", "files": "gone.bin", "dtype": "uint16"}, "data, source 'raw': cannot read gone.bin"),
        (
            {"sources": '[{}, {source = "megatron", path = "g.idx"}]'},
            "data.sources, table 2, source 'megatron': cannot",
        ),
        ({"phases": "[{from_step = 1, seq_len = 2048}]"}, "data.phases, table 1: seq_len 2048 is over the model's"),
        ({"phases": "[{from_step = 4, seq_len = 64}, {from_step = 4, seq_len = 32}]"}, "[data] phases must be in the"),
    ],
)
def test_errors_in_data_name_their_key(
    settings: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {f"data.{key}": value for key, value in settings.items()}
    assert train(tmp_path / "run", given) == ExitCode.BAD_CONFIG
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown


def test_a_longer_phase_must_divide_among_tensor_parallel_ranks(tmp_path: Path) -> None:
    phases = {"data.phases": "[{from_step = 1, seq_len = 33}]", "parallel.tp": "2"}
    with pytest.raises(ConfigError, match="33"):
        check(tiny_config({**phases, "model.vocab_size": "300"}), world_size=2)


def test_changed_data_is_refused_until_allowed(
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


@pytest.mark.slow
def test_several_changes_make_one_flag(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = of_files(corpus / "squares.jsonl")
    assert train(tmp_path, text) == ExitCode.DONE
    others = {"training.steps": "11", "run.seed": "5", "data.packing": "concat", "data.allow_changes": "seed"}
    assert train(tmp_path, {**text, **others}) == ExitCode.FAILED
    assert '--data.allow_changes \'["packing", "seed"]\'' in capsys.readouterr().err
    assert train(tmp_path, {**text, **others, "data.allow_changes": '["packing", "seed"]'}) == ExitCode.DONE


def test_a_run_whose_data_is_exhausted_is_saved(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {**of_files(corpus / "cubes.jsonl", max_epochs="1"), "training.steps": "4000", "training.seq_len": "128"}
    assert train(tmp_path, few) == ExitCode.FAILED
    last = reports(tmp_path)[-1]["step"]
    shown = capsys.readouterr().err
    assert f"data exhausted after step {last} of 4000 (checkpoint saved)" in shown
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
