"""Settings from default, file and command line; and the messages about invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_train import settings
from titan_train.check import check
from titan_train.cli import main
from titan_train.config.fields import all_settings
from titan_train.config.sources import FilesSource
from titan_train.errors import ConfigError, ExitCode


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def message(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(list(arguments)) == ExitCode.BAD_CONFIG
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.err


@pytest.mark.parametrize("name", settings.config_names())
def test_shipped_configs_are_valid(name: str) -> None:
    loaded = settings.load(name)
    assert loaded.config.run.folder == f"runs/{name}"
    check(loaded.config, world_size=64 if loaded.config.parallel.tp > 1 else 1)


def test_the_promised_configs_are_shipped() -> None:
    wanted = {
        "debug",
        "debug_qwen3",
        "debug_moe",
        "llama2_7b",
        "llama2_13b",
        "llama2_70b",
        "llama3_8b",
        "llama3_70b",
        "llama3_1_405b",
    }
    assert wanted <= set(settings.config_names())


def test_command_line_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.toml", "[training]\nsteps = 5\nseq_len = 64\n")
    loaded = settings.load(file, [("training.steps", "7"), ("training.max_norm", "none")])
    training = loaded.config.training
    assert (training.steps, training.seq_len, training.microbatch_size, training.max_norm) == (7, 64, None, None)
    assert loaded.origins == {
        "training.steps": "--training.steps",
        "training.seq_len": file,
        "training.max_norm": "--training.max_norm",
    }
    assert loaded.config.run.folder == "runs/mine"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.lr", "1e-3", 1e-3),
        ("optimizer.lr", "1", 1.0),
        ("data.shuffle", "false", False),
        ("data.tokenizer", "2012", "2012"),
        ("data.allow_changes", "seed", ["seed"]),
        ("data.allow_changes", '["seed", "data"]', ["seed", "data"]),
        ("parallel.dp_shard", "-1", -1),
        ("training.microbatch_size", "2", 2),
        ("model.tied_embeddings", "false", False),
        ("checkpoint.keep_last", "none", None),
        ("parallel.reshard_after_forward", "2", 2),
        ("parallel.reshard_after_forward", "never", "never"),
        ("parallel.first_stage_less", "0.5", 0.5),
        ("parallel.float8_skip", "layers.*", ["layers.*"]),
    ],
)
def test_flags_take_the_type_of_their_setting(key: str, text: str, value: object) -> None:
    config = settings.load("debug", [(key, text)]).config
    section, leaf = key.split(".")
    assert getattr(getattr(config, section), leaf) == value


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    overrides = [
        ("training.max_norm", "none"),
        ("data.source", "files"),
        ("data.files", '["a b", "c\\"d"]'),
        ("optimizer.eps", "1e-12"),
    ]
    loaded = settings.load("debug", overrides)
    again = settings.load(write(tmp_path / "config.toml", settings.to_toml(loaded.config, loaded.origins)))
    assert again.config == loaded.config


def test_mixture_reads_back_equal(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mixed.toml",
        "[[data.sources]]\nname = 'a \"b'\nfiles = ['x', 'y']\nsource = 'files'\nweight = 0.25\nmax_epochs = 2\n"
        "[[data.sources]]\nweight = 0.0\n[[data.phases]]\nfrom_step = 5\nweights = {'a \"b' = 1.0, stdlib = 2.5}\n",
    )
    loaded = settings.load(file)
    assert [source.name for source in loaded.config.data.sources] == ['a "b', None]
    again = settings.load(write(tmp_path / "config.toml", settings.to_toml(loaded.config, loaded.origins)))
    assert again.config == loaded.config


def test_another_kind_of_source_replaces_that_of_the_file() -> None:
    """The settings of the file's source that the flag's kind does not have go with it; others stay."""
    loaded = settings.load("llama3_8b", [("data.source", "files"), ("data.files", "a.jsonl"), ("data.workers", "2")])
    assert loaded.config.data.source == FilesSource(files=["a.jsonl"], streaming=True)
    assert loaded.origins["data.streaming"] == "preset llama3_8b"
    assert "data.path" not in loaded.origins
    again = settings.load("llama3_8b", [("data.source", "huggingface")])
    assert again.config == settings.load("llama3_8b").config


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings.load("debug").config.training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "debgu"], ["no such file, nor a preset", "did you mean 'debug'"]),
        (["--config", "debug", "--training.stepz", "5"], ["--training.stepz: unknown", "--training.steps?"]),
        (["--config", "debug", "--steps", "5"], ["--steps: unknown", "--training.steps?"]),
        (["--config", "debug", "--training.steps=ten"], ["--training.steps is 'ten'", "expected int"]),
        (["--config", "debug", "--training.steps", "0"], ["--training.steps is 0", "greater than or equal to 1"]),
        (["--config", "debug", "--training.dtype", "float16"], ["one of float32, bfloat16"]),
        (["--config", "debug", "--training.steps"], ["expected one argument"]),
        (["--config", "debug", "--nproc", "two"], ["--nproc", "invalid int"]),
        (["--config", "debug", "--nproc", "0"], ["--nproc is 0", "at least 1"]),
        (["--config", "debug", "steps"], ["unexpected argument 'steps'"]),
        ([], ["--config is missing", "debug"]),
        (["--config", "debug", "--model.preset", "llama3_8"], ["unknown model preset", "llama3_8b"]),
        (["--config", "debug", "--model.dim", "100"], ["dim 100 is not a multiple of n_heads 8"]),
        (
            ["--config", "debug", "--model.vocab_size", "100"],
            ["vocab_size 100 is less than the tokenizer's 258", "model.vocab_size = 258"],
        ),
        (["--config", "debug", "--training.seq_len", "4096"], ["over the model's max_seq_len 1024"]),
        (["--config", "debug", "--training.microbatch_size", "3"], ["3 does not divide a rank's 8 sequences"]),
        (["--config", "debug", "--parallel.tp", "2"], ["tp 2 = 2", "number of processes, 1"]),
        (["--config", "debug", "--nproc", "3"], ["cannot be split over 3", "9 could"]),
        (["--config", "debug", "--nproc", "3", "--parallel.tp", "3"], ["tp 3 does not divide", "[1, 2, 4"]),
        (["--config", "debug", "--parallel.reshard_after_forward", "3"], ["not divide the 1 ranks that", "'never'"]),
        (["--config", "debug", "--parallel.async_tp", "true"], ["[parallel] async_tp: requires tp above 1"]),
        (["--config", "debug", "--parallel.memory_budget", "0.5"], ["memory_budget: is 0.5 while", "'none'; set both"]),
        (["--config", "debug", "--data.source", "huggingface"], ['source "huggingface" needs path: name of a dataset']),
        (["--config", "debug", "--data.source", "shards"], ['source "shards" needs path: folder']),
        (["--config", "debug", "--data.source", "files"], ['source "files" needs files']),
        (["--config", "debug", "--data.allow_changes", "date"], ["data.allow_changes", "data, mixture"]),
        (["--config", "debug", "--data.tokenizer", "gone"], ["data.tokenizer: tokenizer gone does not exist"]),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = message(*arguments, capsys=capsys)
    for part in says:
        assert part in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[training]\nstep = 5\n", ["{file}: training.step: unknown setting", "training.steps?"]),
        ("[trainin]\nsteps = 5\n", ["{file}: unknown section [trainin]", "training?"]),
        ("[training]\nsteps = '5'\n", ["{file}: training.steps is '5'", "expected int"]),
        ("[training]\nsteps = true\n", ["training.steps is True", "expected int"]),
        ("[optimizer]\nlr = -1.0\n", ["optimizer.lr is -1.0", "expected float", "greater than 0"]),
        ("training = 5\n", ["{file}: [training] must be a table of settings, not 5"]),
        ("[training\n", ["{file} is not valid TOML", "line 1"]),
        ("[[data.sources]]\nweight = 'a'\n", ["{file}: data.sources, table 1: weight is 'a'", "expected float"]),
        ("[[data.sources]]\nwieght = 1.0\n", ["data.sources, table 1: wieght: unknown", "did you mean weight?"]),
        ("[[data.sources]]\nsource = 'shards'\n", ['[data.sources], table 1: source "shards" needs path: folder']),
        ("[data]\nsources = 5\n", ["data.sources is 5", "expected list of tables"]),
        ("[data]\nsources = [5]\n", ["[data.sources], table 1 must be a table of settings, not 5"]),
        ("[data]\nsource = 'file'\n", ["data.source is 'file': expected one of stdlib, files"]),
        ("[[data.sources]]\nsource = 'file'\n", ["data.sources, table 1: source is 'file': expected one of stdlib"]),
        ("[data]\npath = 'x'\n", ['data.path: not a setting of source "stdlib", but of "shards" and "huggingface"']),
        ("[[data.sources]]\neos_id = 0\n", ['table 1: eos_id: not a setting of source "stdlib", but of "raw"']),
        ("[data]\nsplit = 'test'\n[[data.sources]]\n", ["split: set this in each of [[data.sources]]"]),
        ("[[data.phases]]\nfrom_step = 5\n", ["phases, table 1: nothing changes"]),
        ("[[data.phases]]\nfrom_step = 5\nweights = {a = 1.0}\n", ["phases: weights need several sources"]),
        ("[training]\nsteps = 0\nseq_len = 0\n", ["training.steps is 0", "training.seq_len is 0"]),
    ],
)
def test_mistakes_in_a_file(text: str, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "mine.toml", text)
    shown = message("--config", file, capsys=capsys)
    for part in says:
        assert part.replace("{file}", file) in shown


def test_missing_data_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    data = ["--data.source", "huggingface", "--data.path", "json", "--data.files", str(tmp_path / "none.jsonl")]
    shown = message("--config", "debug", "--run.folder", str(tmp_path / "run"), *data, capsys=capsys)
    assert "none.jsonl" in shown


def test_float8_on_a_device_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--run.device", "cpu", "--run.folder", str(tmp_path), "--parallel.float8", "tensorwise"]
    assert "[parallel] float8: requires " in message("--config", "debug", *flags, capsys=capsys)


def test_cuda_on_a_machine_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    flags = ["--run.device", "cuda", "--run.folder", str(tmp_path)]
    assert "sees no CUDA device" in message("--config", "debug", *flags, capsys=capsys)


def test_help_lists_every_setting_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key, setting in all_settings().items():
        assert f"--{key} VALUE" in shown
        assert setting.help, f"{key} has no text"
        assert setting.help in shown
        default = "no default" if setting.required else f"default: {settings.shown(setting.default)}"
        assert f"({setting.type_name}; {default})" in shown


def test_print_config_says_where_values_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "debug", "--training.steps", "7", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "steps = 7  # --training.steps\n" in shown
    assert "seq_len = 128  # preset debug\n" in shown
    assert "max_norm = 1.0  # default\n" in shown


def test_a_typo_is_reported_without_importing_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from titan_train.cli import main; code = main(['--config', 'debug', '--training.stepz', '1']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == ExitCode.BAD_CONFIG


def test_load_raises_config_error_only() -> None:
    with pytest.raises(ConfigError):
        settings.load("debug", [("training.steps", "1.5")])
