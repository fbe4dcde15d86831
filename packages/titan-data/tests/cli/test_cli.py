"""`titan-data` on the command line: from text to tokens, messages of one line, exit codes."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_corpus import write_parquet
from titan_data import ByteTokenizer, ListSource, cli
from titan_data.shards.dataset import TokenShards
from titan_data.tokenizers.load import load_tokenizer

TEXTS = [f"document {i} has so many words " * (i % 9) for i in range(50)]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two files of JSON lines in the present folder; one record is broken."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    lines[30] = '{"text": \n'
    (tmp_path / "part-1.jsonl").write_text("".join(lines[:25]))
    (tmp_path / "part-2.jsonl").write_text("".join(lines[25:]))
    return [*TEXTS[:30], "", *TEXTS[31:]]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command; give its exit code and what it wrote."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    written = capsys.readouterr()
    assert "Traceback" not in written.err
    return code, written.out, written.err


def prepare(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return run(capsys, "prepare", "part-*.jsonl", "--tokenizer", "bytes", "--workers", "0", "--out", "out", *arguments)


def test_prepare_inspect_verify(corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = prepare(capsys)
    tokens = sum(len(text) + 2 for text in corpus if text)
    assert code == 0
    assert f"out: 50 documents, {tokens:,} tokens" in out
    assert "7 of the documents are empty" in out
    assert "1 malformed records were found" in out
    shards = TokenShards("out")
    assert [bytes(shards[i].tolist()[1:-1]).decode() for i in range(50)] == corpus

    code, out, _ = run(capsys, "inspect", "out", "--tokenizer", "bytes", "--samples", "2")
    assert code == 0
    assert f"out: 50 documents, {tokens:,} tokens, tokenizer titan-data/bytes/1" in out
    assert "tokens per document: 31 to 242, " in out
    assert "empty documents: 7" in out
    rows = [line.split()[:4] for line in out.splitlines() if " to " in line and line.strip()[0].isdigit()]
    assert [row[0] for row in rows] == ["16", "32", "64", "128"]
    assert sum(int(row[3]) for row in rows) == 43
    assert out.count("has so many words") >= 2
    assert run(capsys, "inspect", "out", "--samples", "1")[1].rstrip().endswith("257]")
    samples = {run(capsys, "inspect", "out", "--samples", "1", "--seed", seed)[1] for seed in ("1", "2", "3")}
    assert len(samples) > 1

    code, out, _ = run(capsys, "verify", "out")
    assert (code, out) == (0, "out: all files are valid\n")


@pytest.mark.parametrize(("flags", "streaming"), [((), None), (("--streaming",), True)])
def test_a_dataset_is_a_stream_where_that_is_asked_for_or_its_default(
    flags: tuple[str, ...],
    streaming: bool | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load(path: str, name: str, **request: Any) -> ListSource:
        asked.append((path, name, request["streaming"]))
        return ListSource(TEXTS)

    monkeypatch.setattr("titan_data.sources.huggingface.load_huggingface_dataset", load)
    out = str(tmp_path / "out")
    code, _, _ = run(capsys, "prepare", "hf:c4:en", "--tokenizer", "bytes", "--workers", "0", "--out", out, *flags)
    assert code == 0
    assert asked == [("c4", "en", streaming)]


def test_verify_names_every_corrupt_file(corpus: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prepare(capsys, "--shard-tokens", "1_000")
    for name in ("shard-000001.tokens", "shard-000003.tokens"):
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    code, out, err = run(capsys, "verify", "out")
    assert code == 1
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "out/shard-000001.tokens",
        "out/shard-000003.tokens",
    ]
    assert "2 corrupt files" in err


def test_parts_and_merge(
    corpus: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(capsys)[1]
    words = ["prepare", "part-*.jsonl", "--tokenizer", "bytes", "--workers", "0", "--out", "parts", "--part"]
    code, out, _ = run(capsys, *words, "1/3")
    assert (code, out) == (0, "parts/part-00001-of-00003: 0 documents, 0 tokens\n")  # two files, three parts
    code, _, err = run(capsys, "merge", "parts")
    assert code == 1
    assert "parts: 2 of 3 parts are not finished: 0/3, 2/3; run the" in err
    assert run(capsys, *words, "3/3")[2] == "titan-data: there is no part 3 of 3: the parts are numbered from 0\n"
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert run(capsys, *words, "auto/3")[0] == 0
    assert run(capsys, *words, "2/3")[0] == 0
    code, out, _ = run(capsys, "merge", "parts")
    assert code == 0
    assert out == whole.splitlines()[0].replace("out:", "parts:") + " in 2 shards\n"
    shards = TokenShards("parts")
    assert [bytes(shards[i].tolist()[1:-1]).decode() for i in range(50)] == corpus
    assert run(capsys, "verify", "parts")[:2] == (0, "parts: all files are valid\n")


@pytest.mark.slow
def test_processes_that_prepare_parts_at_once(corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "titan_data", "prepare", "part-*.jsonl", "--tokenizer", "bytes", "--workers", "0"]
    for folder, count, at_once in (("a", 2, 2), ("b", 2, 1), ("c", 3, 3)):
        parts = "".join(f"{index}/{count}\n" for index in range(count))
        xargs = ["xargs", "-P", str(at_once), "-I{}", *command, "--out", folder, "--part", "{}"]
        subprocess.run(xargs, input=parts, text=True, check=True, capture_output=True, timeout=300)
        assert run(capsys, "merge", folder)[0] == 0
    for path in Path("a").rglob("*.*"):
        assert path.is_dir() or path.read_bytes() == ("b" / path.relative_to("a")).read_bytes()
    a, c = TokenShards("a"), TokenShards("c")
    assert [a[i].tolist() for i in range(50)] == [c[i].tolist() for i in range(50)]
    assert a.identity == c.identity


def test_train_tokenizer_and_use_it(corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    for kind, size in (("bpe", 530), ("sentencepiece", 300)):
        words = [
            "train-tokenizer",
            "part-1.jsonl",
            "--kind",
            kind,
            "--vocab-size",
            str(size),
            "--out",
            f"{kind}/t.model",
        ]
        code, out, _ = run(capsys, *words)
        assert code == 0
        assert out.startswith(f"{kind}/t.model: {size} ids, fingerprint ")
        assert load_tokenizer(f"{kind}/t.model").vocab_size == size
        code, _, err = run(capsys, *words)
        assert (code, err) == (1, f"titan-data: {kind}/t.model already exists: remove it, or choose another --out\n")
    run(capsys, "train-tokenizer", "part-1.jsonl", "--kind", "bpe", "--vocab-size", "530", "--out", "same.model")
    assert Path("same.model").read_bytes() == Path("bpe/t.model").read_bytes()
    words = ["train-tokenizer", "part-1.jsonl", "--kind", "bpe", "--vocab-size", "513", "--max-documents", "1"]
    assert "there is no text to train a tokenizer on" in run(capsys, *words, "--out", "few.model")[2]
    assert run(capsys, "prepare", "part-*", "--tokenizer", "bpe/t.model", "--out", "b", "--workers", "0")[0] == 0
    code, out, _ = run(capsys, "inspect", "b", "--tokenizer", "bpe/t.model", "--samples", "9")
    assert (code, "has so many words" in out) == (0, True)
    code, _, err = run(capsys, "inspect", "b", "--tokenizer", "bytes")
    assert code == 1
    assert "these tokens were made by tokenizer tiktoken/" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["prepare", "nothing-*.jsonl", "--tokenizer", "bytes", "--out", "out"], 1, "no file matches"),
        (["prepare", "stdlib", "x.txt", "--tokenizer", "bytes", "--out", "out"], 1, "stdlib cannot be combined"),
        (["prepare", "stdlib", "--tokenizer", "nowhere", "--out", "out"], 1, "tokenizer nowhere does not exist"),
        (["prepare", "stdlib", "--out", "out"], 2, "required: --tokenizer"),
        (
            ["prepare", "stdlib", "--tokenizer", "bytes", "--out", "out", "--workers", "-1"],
            2,
            "must be at least 0, not -1",
        ),
        (["prepare", "stdlib", "--tokenizer", "bytes", "--out", "out", "--shard-tokens", "0"], 2, "at least 1"),
        (["inspect", "nowhere"], 1, "contains no token shards"),
        (["inspect", "x.bin"], 1, "set --dtype"),
        (["inspect", "x.bin", "--dtype", "uint16"], 1, "cannot read x.bin"),
        (["verify", "nowhere"], 1, "contains no token shards"),
        (["verify"], 2, "required: path"),
        ([], 2, "required: COMMAND"),
        (["prepar"], 2, "invalid choice: 'prepar'"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "")
    assert message in err
    lines = [line for line in err.splitlines() if line.startswith("titan-data")]
    assert len(lines) == 1


def test_unreadable_files_are_a_failure_unless_allowed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps({"text": f"{i} {i * 2654435761 % 1000003}"}) + "\n" for i in range(1000)).encode()
    write_parquet(tmp_path / "1.parquet", ["a"] * 10)
    write_parquet(tmp_path / "2.parquet", ["b"] * 1000, key="content")
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(lines)[:-500])
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(lines))
    for kind, lost in {
        "parquet": "2.parquet: .*1,000 rows",
        "jsonl.gz": r"1\.jsonl\.gz, after line \d+: .*bytes",
    }.items():
        words = ["prepare", f"*.{kind}", "--tokenizer", "bytes", "--workers", "0", "--out", kind]
        for _ in range(2):  # also when it is repeated
            code, out, err = run(capsys, *words)
            assert (code, out) == (1, "")
            assert re.search(lost.replace(": ", ":? "), err)
            assert "on_unreadable_file" in err
        assert not Path(kind, "index.json").exists()
        code, out, _ = run(capsys, *words, "--on-unreadable-file", "skip")
        assert code == 0
        assert re.search(f"unreadable: .*{lost}", out)


@pytest.mark.parametrize("line", ['{"text": ""}', '{"text": 1}'])
def test_a_prepare_without_a_token_is_a_failure(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(f"{line}\n" * 10)
    for _ in range(2):
        code, out, err = run(capsys, "prepare", "a.jsonl", "--tokenizer", "bytes", "--workers", "0", "--out", "out")
        assert (code, out) == (1, "")
        assert "has no text in any of its 10 documents" in err


@pytest.mark.parametrize("command", ["", "prepare", "inspect", "verify", "train-tokenizer", "download-tokenizer"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert "usage: titan-data" in out


def test_help_is_quick() -> None:
    """It imports none of the libraries that take their time."""
    code = "import sys\nfrom titan_data import cli\ntry: cli.main(['prepare', '--help'])\nfinally: print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    modules = ended.stdout.splitlines()[-1].split()
    assert "titan_data.cli.prepare" in modules
    assert not {"torch", "numpy", "fsspec", "rich", "pyarrow", "tokenizers", "tiktoken"} & {*modules}


def test_other_formats_of_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.array([5, 6, 0, 7, 0], dtype=np.uint16).tofile("train.bin")
    code, out, _ = run(capsys, "inspect", "train.bin", "--dtype", "uint16", "--eos-id", "0")
    assert code == 0
    assert "train.bin: 2 documents, 5 tokens, tokenizer unknown" in out
    assert "[5, 6, 0]" in out
    assert "contains id 7" in run(capsys, "inspect", "train.bin", "--dtype", "uint16", "--vocab-size", "7")[2]


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As at a terminal: the background jobs of a shell begin without Python's handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted(ByteTokenizer):
    """Presses Ctrl-C while it tokenizes document number `at`."""

    def __init__(self, at: int, presses: int = 1) -> None:
        super().__init__()
        self.left, self.presses = at, presses

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.left -= len(texts)
        if self.left < 0 and self.presses:
            for _ in range(self.presses):
                os.kill(os.getpid(), signal.SIGINT)
            self.presses = 0
        return super().encode_batch(texts)


@pytest.mark.parametrize("at", [0, 2, 7, 11])
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_stopped_by_ctrl_c_it_goes_on(
    at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("titan_data.shards.batches._BATCH_CHARACTERS", 1)  # a batch, and a look at Ctrl-C, per document
    for number in range(12):
        Path(f"{number:02}.txt").write_text("a line of text\n" * 10)
    words = ["prepare", "*.txt", "--tokenizer", "bytes", "--shard-tokens", "400", "--workers", "0", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["titan_data.tokenizers.load"], "load_tokenizer", lambda path, **_: Interrupted(at))
        code, _, err = run(capsys, *words)
    assert (code, err.splitlines()[-1]) == (130, "titan-data: stopped")
    assert not list(Path("out").glob("*.part"))
    kept = {path: path.stat().st_mtime_ns for path in Path("out").glob("shard-*")}
    assert len(kept) == at // 2
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert out.startswith("out: 12 documents, 1,824 tokens")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished shards were written again"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_second_ctrl_c_ends_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    tokenizer = Interrupted(0, presses=2)
    monkeypatch.setattr(sys.modules["titan_data.tokenizers.load"], "load_tokenizer", lambda path, **_: tokenizer)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda self, texts: pytest.fail("it goes on"))
    code, _, err = run(capsys, "prepare", "*.txt", "--tokenizer", "bytes", "--workers", "0", "--out", "out")
    assert (code, err.splitlines()[-1]) == (130, "titan-data: stopped")


PRESSED = """
import os, signal, sys
from titan_data import cli
from titan_data.shards.writer import ShardWriter

publish = ShardWriter.publish


def and_press(self, source_end):
    header = publish(self, source_end)
    os.kill(os.getpid(), signal.SIGINT)
    ShardWriter.publish = publish
    return header


ShardWriter.publish = and_press
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_on_a_real_command_leaves_one_line(corpus: list[str]) -> None:
    words = ["prepare", "part-*.jsonl", "--tokenizer", "bytes", "--shard-tokens", "500", "--out", "out"]
    command = [sys.executable, "-c", PRESSED, *words, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.splitlines()[-1] == "titan-data: stopped"
    assert "Traceback" not in ended.stderr
    assert Path("out/shard-000000.tokens").exists()
    assert not Path("out/index.json").exists()
    assert not list(Path("out").glob("*.part"))
