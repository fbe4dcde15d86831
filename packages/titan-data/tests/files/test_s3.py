"""Corpora in an S3 bucket: found, read from any place, and read through a server that fails, stalls or refuses."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_corpus import TEXTS, write_jsonl, write_parquet
from data_flat import flat_files
from data_s3 import s3_server
from titan_data import DataError, cli
from titan_data.files.retry import Retry
from titan_data.shards.dataset import TokenShards


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as (address, faults):
        fsspec.config.conf["s3"] = {
            "endpoint_url": address,
            "key": "k",
            "secret": "s",
            "client_kwargs": {"region_name": "eu-west-1"},
            # One attempt each: what is tried again here, is by titan-data.
            "config_kwargs": {"retries": {"total_max_attempts": 1, "mode": "standard"}},
        }
        fsspec.filesystem("s3").mkdir("corpora")
        yield faults
        del fsspec.config.conf["s3"]


@pytest.fixture
def faults(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    server.coming.clear()
    server.reads.clear()
    return server


@pytest.fixture(scope="module")
def corpus(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files on disk and in the bucket: `part-N` of either kind, N from 1 to 10."""
    pytest.importorskip("zstandard")
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("corpus")
    for number in (1, 2, 10):
        texts = [f"{number} {text}" for text in TEXTS]
        write_jsonl(folder / f"part-{number}.jsonl", texts, "zst")
        write_parquet(folder / f"part-{number}.parquet", texts)
    remote = fsspec.filesystem("s3")
    for path in folder.iterdir():
        remote.pipe_file(f"corpora/corpus/{path.name}", path.read_bytes())
    return folder


def expected() -> list[str]:
    return [f"{number} {text}" for number in (1, 2, 10) for text in TEXTS]


@pytest.mark.parametrize("suffix", ["jsonl.zst", "parquet"])
def test_a_glob_gives_what_it_gives_on_disk(corpus: Path, faults: Any, suffix: str) -> None:
    source = flat_files(f"s3://corpora/corpus/part-*.{suffix}", streaming=True, shards=1)
    assert list(source.iterate(0, 0)) == expected()
    assert list(source.iterate(0, len(TEXTS) + 3)) == expected()[len(TEXTS) + 3 :]
    local = flat_files(corpus / f"part-*.{suffix}", streaming=True, shards=1)
    assert source.fingerprint() == local.fingerprint()


@pytest.mark.parametrize("fault", [503, "stall"])
def test_a_server_that_fails_for_a_while_is_read_through(corpus: Path, faults: Any, fault: int | str) -> None:
    waits = []
    retry = Retry(attempts=4, stall=0.5 if fault == "stall" else 120, sleep=waits.append)
    source = flat_files("s3://corpora/corpus/part-*.jsonl.zst", streaming=True, shards=1, retry=retry)
    faults.coming[:] = [fault, fault, None, fault]
    assert list(source.iterate(0, 0)) == expected()
    assert faults.coming == []
    assert len(waits) == 3


def test_a_server_that_is_gone_for_good_is_an_error_that_names_the_file(corpus: Path, faults: Any) -> None:
    retry = Retry(attempts=2, sleep=lambda seconds: None)
    source = flat_files("s3://corpora/corpus/part-2.parquet", streaming=True, retry=retry)
    faults.coming[:] = [503] * 2
    with pytest.raises(DataError, match=r"s3://corpora/corpus/part-2\.parquet could not be read .* after 2 attempts"):
        list(source.iterate(0, 0))


def test_what_is_not_there_is_said_at_once(corpus: Path, faults: Any) -> None:
    with pytest.raises(DataError, match=r"no file matches s3://corpora/corpus/\*\.json; .* contains"):
        flat_files("s3://corpora/corpus/*.json", streaming=True)
    with pytest.raises(DataError, match=r"file s3://nowhere/a\.jsonl does not exist"):
        flat_files("s3://nowhere/a.jsonl", streaming=True)


def test_prepare_reads_a_bucket(corpus: Path, faults: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "s3://corpora/corpus/*.jsonl.zst", "--streaming", "--tokenizer", "bytes", "--workers", "0"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert f"{len(expected())} documents" in capsys.readouterr().out
    shards = TokenShards(tmp_path / "out")
    assert len(shards) == len(expected())
