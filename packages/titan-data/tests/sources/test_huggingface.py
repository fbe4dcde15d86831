"""load_huggingface_dataset over local files: records and streams, resuming, and errors that say what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import data_hub
from data_flat import flat_dataset, flat_loader
from titan_data import ByteTokenizer, DataError, Loader, RandomAccessSource, StreamSource
from titan_data.files.retry import Retry
from titan_data.fingerprint import list_differences
from titan_data.sources.huggingface import HuggingFaceStream

TEXTS = [f"record {i}: " + "word " * (i % 9) for i in range(60)]
ONE, TWO = TEXTS[:40], TEXTS[40:]
IN_TURN = [text for pair in zip(ONE, TWO, strict=False) for text in pair] + ONE[20:]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The library, kept off the network; its cache is under tmp_path where a test passes `cache_dir`."""
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "default_cache")
    module.disable_progress_bars()
    return module


@pytest.fixture
def jsonl(tmp_path: Path) -> list[str]:
    """Two files with 40 and 20 records."""
    paths = []
    for name, part in (("one.jsonl", ONE), ("two.jsonl", TWO)):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in part), encoding="utf-8")
        paths.append(str(path))
    return paths


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "all.parquet"
    writer.write_table(pyarrow.table({"body": TEXTS, "n": list(range(60))}), path, row_group_size=7)
    return str(path)


def open_jsonl(jsonl: list[str], tmp_path: Path, **changes: Any) -> Any:
    return flat_dataset("json", **{"data_files": jsonl, "cache_directory": tmp_path / "cache", **changes})


def read_all(source: Any) -> list[Any]:
    """All texts, those of a stream in the order of a loader: one of each shard in turn."""
    if isinstance(source, StreamSource):
        shards = [iter(source.iterate(shard, 0)) for shard in range(source.shards)]
        return [text for turn in zip_longest(*shards) for text in turn if text is not None]
    return [source[i] for i in range(len(source))]


def check_resume(source: Any) -> None:
    """Stop after 7 steps on one rank, resume on two ranks: the same sequences as without a stop."""

    def ranks(world_size: int) -> list[Loader]:
        sizes = {"seq_len": 32, "global_batch_size": 4, "seed": 1}
        return [flat_loader(source, ByteTokenizer(), **sizes, rank=r, world_size=world_size) for r in range(world_size)]

    (whole,) = ranks(1)
    for _ in range(7):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = ranks(2)
    for loader in resumed:
        loader.load_state_dict(state)
    for _ in range(30):
        expected = next(whole)
        rows = [next(loader) for loader in resumed]
        assert torch.equal(torch.cat([row["tokens"] for row in rows]), expected["tokens"])
        assert torch.equal(torch.cat([row["labels"] for row in rows]), expected["labels"])
    assert whole.accounting()[source.name]["epoch"] > 0, "the test should cross an epoch"


@pytest.mark.parametrize("streaming", [False, True])
def test_jsonl(datasets: Any, jsonl: list[str], tmp_path: Path, streaming: bool) -> None:
    source = open_jsonl(jsonl, tmp_path, streaming=streaming)
    assert isinstance(source, StreamSource if streaming else RandomAccessSource)
    assert read_all(source) == (IN_TURN if streaming else TEXTS)
    assert source.name == "json:one.jsonl"
    if streaming:
        assert source.shards == 2
        for start in (0, 1, 19, 20, 39, 40, 41):
            assert list(source.iterate(0, start)) == ONE[start:]
            assert list(source.iterate(1, start)) == TWO[start:]
    check_resume(source)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(datasets: Any, parquet: str, tmp_path: Path, streaming: bool) -> None:
    source = flat_dataset(
        "parquet", data_files=parquet, text_key="body", streaming=streaming, cache_directory=tmp_path / "cache"
    )
    assert read_all(source) == TEXTS
    check_resume(source)


def test_patterns_folders_and_options(datasets: Any, jsonl: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    assert read_all(open_jsonl(str(folder / "*.jsonl"), tmp_path, streaming=True)) == IN_TURN
    assert read_all(flat_dataset(str(folder), streaming=True)) == IN_TURN
    assert read_all(flat_dataset(str(folder), data_files="two.jsonl", streaming=True)) == TWO
    whole = flat_dataset("text", data_files=jsonl[0], streaming=True, sample_by="document")
    assert len(read_all(whole)) == 1


def test_the_order_of_files_is_the_order_given(datasets: Any, jsonl: list[str], tmp_path: Path) -> None:
    source = open_jsonl(jsonl[::-1], tmp_path, streaming=True)
    assert [list(source.iterate(shard, 0)) for shard in (0, 1)] == [TWO, ONE]
    assert read_all(open_jsonl(jsonl[::-1], tmp_path, streaming=True, shards=1)) == TWO + ONE


@pytest.mark.parametrize("streaming", [False, True])
def test_fingerprint(datasets: Any, jsonl: list[str], tmp_path: Path, streaming: bool) -> None:
    source = open_jsonl(jsonl, tmp_path, streaming=streaming)
    moved = shutil.copytree(tmp_path / "corpus", tmp_path / "moved")
    paths = [str(moved / "one.jsonl"), str(moved / "two.jsonl")]
    same = open_jsonl(paths, tmp_path, streaming=streaming, cache_directory=tmp_path / "cache2")
    assert same.fingerprint() == source.fingerprint()
    others = [
        open_jsonl(jsonl, tmp_path, streaming=not streaming),
        open_jsonl(jsonl[::-1], tmp_path, streaming=streaming),
        open_jsonl(jsonl[:1], tmp_path, streaming=streaming),
    ]
    with Path(paths[0]).open("a", encoding="utf-8") as file:
        file.write('{"text": "more", "n": 1}\n')
    others.append(open_jsonl(paths, tmp_path, streaming=streaming))
    assert len({source.fingerprint().digest, *(other.fingerprint().digest for other in others)}) == 5
    assert list_differences(source.fingerprint(), others[-1].fingerprint())[-1] == "edited: one.jsonl"
    state = flat_loader(source, ByteTokenizer(), seq_len=8, global_batch_size=1).state_dict()
    loader = flat_loader(others[-1], ByteTokenizer(), seq_len=8, global_batch_size=1)
    with pytest.raises(DataError, match=r"edited: one\.jsonl"):
        loader.load_state_dict(state)


def test_options_are_part_of_the_fingerprint(datasets: Any, jsonl: list[str]) -> None:
    by_line, by_document = (
        flat_dataset("text", data_files=jsonl, streaming=True, sample_by=unit) for unit in ("line", "document")
    )
    assert by_line.fingerprint() != by_document.fingerprint()


def test_hidden_files_in_a_folder_do_not_count(datasets: Any, jsonl: list[str], tmp_path: Path) -> None:
    before = flat_dataset(str(tmp_path / "corpus"), streaming=True)
    hidden = tmp_path / "corpus" / ".cache" / "notes"
    hidden.parent.mkdir()
    hidden.write_text("what a download tool keeps for itself", encoding="utf-8")
    assert flat_dataset(str(tmp_path / "corpus"), streaming=True).fingerprint() == before.fingerprint()


@pytest.mark.parametrize("streaming", [False, True])
def test_none_and_empty_texts_are_empty_documents(datasets: Any, tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n', encoding="utf-8")
    source = open_jsonl(str(path), tmp_path, streaming=streaming)
    assert read_all(source) == ["a", "", "", "b"]
    loader = flat_loader(source, ByteTokenizer(), seq_len=6, global_batch_size=1, shuffle=False)
    assert next(loader)["tokens"].tolist() == [[256, 97, 257, 256, 98, 257]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_names_those_there_are(
    datasets: Any, jsonl: list[str], tmp_path: Path, streaming: bool
) -> None:
    with pytest.raises(DataError, match="no column 'content'; set text_key to one of: n, text"):
        open_jsonl(jsonl, tmp_path, streaming=streaming, text_key="content")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_text(datasets: Any, jsonl: list[str], tmp_path: Path, streaming: bool) -> None:
    source = open_jsonl(jsonl, tmp_path, streaming=streaming, text_key="n")
    with pytest.raises(DataError, match="column 'n' is of type int, not text"):
        read_all(source)


def test_missing_files_are_named(datasets: Any, jsonl: list[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"file .*absent\.jsonl does not exist"):
        open_jsonl([jsonl[0], missing], tmp_path)
    with pytest.raises(DataError, match=r"no file matches .*\*\.parquet"):
        open_jsonl(str(tmp_path / "*.parquet"), tmp_path)
    with pytest.raises(DataError, match=r"folder \./nowhere does not exist"):
        flat_dataset("./nowhere")
    with pytest.raises(DataError, match="needs data_files"):
        flat_dataset("json")


def test_what_datasets_refuses_becomes_a_data_error(datasets: Any, jsonl: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"could not load 'json', split 'test': .*test"):
        open_jsonl(jsonl, tmp_path, split="test")
    with pytest.raises(DataError, match="Hub cannot be reached for dataset 'nobody/nothing'"):
        flat_dataset("nobody/nothing", cache_directory=tmp_path / "cache")
    with pytest.raises(DataError, match=r"could not load 'json'.*lines_per_page"):
        open_jsonl(jsonl, tmp_path, lines_per_page=3)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": ', encoding="utf-8")
    with pytest.raises(DataError, match="could not load 'json'"):
        open_jsonl(str(broken), tmp_path)


def test_code_in_a_dataset_is_not_run(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    with pytest.raises(DataError, match="could not load"):
        flat_dataset(str(tmp_path / "evil"))


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"pip install 'titan-data\[huggingface\]'"):
        flat_dataset("json", data_files=str(tmp_path / "a.jsonl"))


def test_shards_are_dealt_whole_files(datasets: Any, tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{number}.{i}"}) + "\n" for i in range(3)), encoding="utf-8")
        paths.append(str(path))
    source = open_jsonl(paths, tmp_path, streaming=True, shards=2)
    expected = [[f"{n}.{i}" for n in range(shard, 5, 2) for i in range(3)] for shard in (0, 1)]
    assert [list(source.iterate(shard, 0)) for shard in (0, 1)] == expected
    for start in range(10):
        assert list(source.iterate(0, start)) == expected[0][start:]
    other = open_jsonl(paths, tmp_path, streaming=True, shards=3)
    assert list_differences(source.fingerprint(), other.fingerprint()) == ["shards: was 2, now 3"]
    with pytest.raises(DataError, match="at least 1 shard"):
        open_jsonl(paths, tmp_path, streaming=True, shards=0)


def test_c4_without_a_network_is_one_line_at_once(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **request: asked.append((args, request)))
    with pytest.raises(DataError, match=r"Hub cannot be reached for dataset 'allenai/c4' \(.*\): connect .* local"):
        flat_dataset("c4")
    assert asked == []


def test_c4_is_the_english_stream(datasets: Any, jsonl: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = datasets.load_dataset
    stream = load("json", data_files=jsonl, split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **request: asked.append((args, request)) or stream)
    answer = SimpleNamespace(sha="a" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **options: answer)
    source = flat_dataset("c4", split="validation")
    ((args, request),) = asked
    assert args == ("allenai/c4",)
    assert (request["name"], request["streaming"], request["split"]) == ("en", True, "validation")
    assert request["trust_remote_code"] is False
    assert request["revision"] == "a" * 40, "the dataset might change between the question and the reading"
    assert isinstance(source, StreamSource)
    assert source.name == "c4:en"
    answer.sha = "b" * 40
    changes = list_differences(source.fingerprint(), flat_dataset("c4", split="validation").fingerprint())
    assert changes == [f"revision: was {'a' * 40!r}, now {'b' * 40!r}"]


HUB_SCRIPT = """
import json
from titan_data import DataError, load_huggingface_dataset

found = {}
for name, streaming in (("corpus", True), ("corpus", False), ("gated", True), ("absent", True)):
    try:
        source = load_huggingface_dataset(f"someone/{name}", streaming=streaming)
        if streaming:
            shards = [list(source.iterate(shard, 3)) for shard in range(source.shards)]
        else:
            shards = [[source[i] for i in range(len(source))]]
        found[f"{name} {streaming}"] = [source.name, shards, source.fingerprint().to_json()["settings"]["revision"]]
    except DataError as error:
        found[f"{name} {streaming}"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow  # `datasets` takes the Hub's address when it is imported, hence the process
def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets")

    def read(hub: Any, **more: Any) -> list[Any]:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), **more}
        environment.pop("HF_HUB_OFFLINE", None)
        run = subprocess.run([sys.executable, "-c", HUB_SCRIPT], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    with data_hub.serve() as hub:
        for name, texts in (("data/train-1.jsonl", ONE), ("data/train-2.jsonl", TWO)):
            hub.files["datasets/someone/corpus", name] = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
        hub.files["datasets/someone/gated", "data/train.jsonl"] = b'{"text": "secret"}\n'
        hub.gated.add("datasets/someone/gated")
        found = read(hub)
        # What has been prepared serves without the Hub, and is known to be of the same commit.
        alone = read(hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert found["corpus True"] == ["someone/corpus", [ONE[3:], TWO[3:]], data_hub.COMMIT]
    assert found["corpus False"] == ["someone/corpus", [TEXTS], data_hub.COMMIT]
    assert "'someone/gated' is a gated dataset on the Hub" in found["gated True"]
    assert "'someone/absent' doesn't exist on the Hub" in found["absent True"]
    assert alone["corpus False"] == found["corpus False"]
    assert "Hub cannot be reached for dataset 'someone/corpus'" in alone["corpus True"]


class Flaky:
    """Stands in for an IterableDataset whose connection breaks."""

    def __init__(self, failures: list[Exception], at: int = 0) -> None:
        self.failures, self.at = failures, at

    def shard(self, num_shards: int, index: int, contiguous: bool) -> "Flaky":
        return self

    def skip(self, count: int) -> "Flaky":
        return Flaky(self.failures, count)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in range(self.at, 6):
            if number in (2, 4) and self.failures:
                raise self.failures.pop()
            yield {"text": str(number)}


def test_a_stream_goes_on_after_failures_of_the_network() -> None:
    waits = []
    retry = Retry(attempts=3, sleep=waits.append)

    def read(failures: list[Exception], start: int = 0) -> list[Any]:
        return list(
            HuggingFaceStream(Flaky(failures), "text", None, name="hub", shards=1, retry=retry).iterate(0, start)
        )

    assert read([ConnectionError(), TimeoutError()], 1) == ["1", "2", "3", "4", "5"]
    assert len(waits) == 2
    with pytest.raises(DataError, match=r"source 'hub', shard 0 of 1: record 2 could .* after 3 attempts: .*gone"):
        read([ConnectionError("gone")] * 3)
    waits.clear()
    with pytest.raises(DataError, match="record 2 could not be read: JSONDecodeError"):
        read([json.JSONDecodeError("broken", "", 0)] * 2)
    assert waits == []
