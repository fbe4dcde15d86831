"""prepare: the same files whatever happens on the way, and errors after which it resumes."""

import contextlib
import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_broken import BrokenTokenizer, InterruptedWhenLoaded, PanickingTokenizer
from titan_data import Fingerprint, Tokenizer, load_files
from titan_data.batching.documents import encode_document
from titan_data.errors import DataError
from titan_data.shards import batches, workers
from titan_data.shards.dataset import TokenShards
from titan_data.shards.format import UNFINISHED, Manifest, shard_name
from titan_data.shards.prepare import Progress, prepare
from titan_data.shards.writer import STAGING, ShardWriter
from titan_data.sources.base import IterableSource, ListSource
from titan_data.tokenizers.base import ByteTokenizer

TEXTS = [f"document {i} " * (i * 7 % 11) for i in range(60)]
TEXTS[50] = "larger than a shard " * 30


class Stream:
    """A stream of several shards, some of them empty."""

    name = "stream"

    def __init__(self, texts: list[str], shards: int = 5) -> None:
        self.texts, self.shards = texts, shards

    def fingerprint(self) -> Fingerprint:
        return ListSource(self.texts).fingerprint()

    def iterate(self, shard: int, start: int) -> Iterator[str]:
        yield from self.of_shard(shard)[start:]

    def of_shard(self, shard: int) -> list[str]:
        return [] if shard in (1, self.shards - 1) else self.texts[shard :: self.shards]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source: Any, folder: Path, workers: int = 0, tokenizer: Tokenizer | None = None, **options: Any) -> Manifest:
    return prepare(source, tokenizer or ByteTokenizer(), folder, workers=workers, shard_tokens=300, **options)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_BATCH_CHARACTERS", 100)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken") / "a"
    run(ListSource(TEXTS), folder)
    return files_of(folder)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_and_the_batches_leave_no_trace(
    unbroken: dict[str, bytes], tmp_path: Path, workers: int, small_batches: None
) -> None:
    run(ListSource(TEXTS), tmp_path / "b", workers=workers)
    assert files_of(tmp_path / "b") == unbroken


def test_a_streams_shards_follow_one_another(tmp_path: Path, small_batches: None) -> None:
    stream = Stream(TEXTS)
    run(stream, tmp_path / "a", workers=2)
    shards = TokenShards(tmp_path / "a")
    texts = [text for shard in range(5) for text in stream.of_shard(shard)]
    assert [shards[i].tolist() for i in range(len(shards))] == [
        encode_document(ByteTokenizer(), text).tolist() for text in texts
    ]


class Killed(BaseException):
    pass


@settings(deadline=None, max_examples=30)
@given(kills=st.lists(st.integers(0, 25), max_size=6), stream=st.booleans(), leftovers=st.booleans())
def test_however_often_it_is_killed_the_files_are_the_same(
    kills: list[int], stream: bool, leftovers: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = Stream(TEXTS) if stream else ListSource(TEXTS)
    parent = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_BATCH_CHARACTERS", 100)
        patch.setattr(os, "fsync", lambda descriptor: None)
        run(source, parent / "whole")
        if leftovers:  # a real kill tidies nothing up
            patch.setattr(ShardWriter, "discard", lambda self: None)
        for kill in kills:
            countdown = [kill]

            def report(progress: Progress, countdown: Any = countdown) -> None:
                countdown[0] -= 1
                if countdown[0] < 0:
                    raise Killed

            with contextlib.suppress(Killed):
                run(source, parent / "broken", report=report)
        run(source, parent / "broken")
    assert files_of(parent / "broken") == files_of(parent / "whole")


COMMAND = """
import os, sys, time
from titan_data.shards.prepare import prepare
from titan_data.sources.base import ListSource
from titan_data.tokenizers.base import ByteTokenizer
from data_broken import BrokenTokenizer, InterruptedWhenLoaded, PanickingTokenizer

class Slow(ByteTokenizer):
    def encode(self, text):
        time.sleep(0.002)
        return super().encode(text)

if __name__ == "__main__":
    texts = [f"document {i} " * 50 for i in range(600)]
    prepare(ListSource(texts), Slow(), sys.argv[1], workers=2, shard_tokens=20_000)
"""


@pytest.mark.slow
def test_kill_9_then_the_same_command(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, str(script), str(folder)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        wait_for(lambda: (folder / shard_name(2)).exists() or process.poll() is not None)
        process.kill()  # only the main process: the workers must end by themselves
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: not any_process_of(process.pid))
    assert (folder / UNFINISHED).exists()
    with pytest.raises(DataError, match="is not finished: run the same"):
        TokenShards(folder)
    kept = {name: (folder / name).stat().st_mtime_ns for name in map(shard_name, range(3))}
    texts = [f"document {i} " * 50 for i in range(600)]
    for path in (folder, tmp_path / "whole"):
        prepare(ListSource(texts), ByteTokenizer(), path, workers=0, shard_tokens=20_000)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept, "finished shards were written again"
    assert files_of(folder) == files_of(tmp_path / "whole")


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def any_process_of(session: int) -> bool:
    """Whether any process of a session is left."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{int(entry.name)}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                return True
    return False


@pytest.mark.parametrize(("limit", "shards"), [(4200, 0), (5000, 11), (6000, 15)])
def test_a_full_disk_stops_it_and_it_goes_on_with_more_room(
    unbroken: dict[str, bytes], tmp_path: Path, limit: int, shards: int
) -> None:
    folder = tmp_path / "full"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Smaller than the first shard, than the one with the large document, than the manifest.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(DataError, match=r"no space left for .*full .*run the same command again"):
            run(ListSource(TEXTS), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.glob("*" + STAGING))
    kept = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    assert kept == {name: unbroken[name] for name in map(shard_name, range(shards))}
    run(ListSource(TEXTS), folder)
    assert files_of(folder) == unbroken


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to"):
        run(ListSource(TEXTS), tmp_path / "file" / "below")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_document_that_cannot_be_tokenized_is_named(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"document 34 cannot be tokenized: RuntimeError\('no such letter'\)"):
        run(ListSource(TEXTS), tmp_path / "a", workers=workers, tokenizer=BrokenTokenizer())


def test_a_worker_that_dies_is_noticed_and_the_rest_kept(
    tmp_path: Path, small_batches: None, unbroken: dict[str, bytes]
) -> None:
    with pytest.raises(DataError, match=r"a worker process has died \(exit code -9\)"):
        run(ListSource(TEXTS), tmp_path / "a", workers=2, tokenizer=BrokenTokenizer(end=True))
    run(ListSource(TEXTS), tmp_path / "a")
    assert files_of(tmp_path / "a") == unbroken


def test_a_source_that_fails_halfway(tmp_path: Path, small_batches: None, unbroken: dict[str, bytes]) -> None:
    class Failing(ListSource):
        broken = True

        def __getitem__(self, index: int) -> str:
            if self.broken and index == 50:
                raise DataError("corpus.jsonl line 50 cannot be read")
            return super().__getitem__(index)

    source = Failing(TEXTS)
    with pytest.raises(DataError, match="line 50 cannot be read"):
        run(source, tmp_path / "a", workers=2)
    assert (tmp_path / "a" / shard_name(2)).exists()
    source.broken = False
    run(source, tmp_path / "a")
    assert files_of(tmp_path / "a") == unbroken


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    first = run(ListSource(TEXTS), tmp_path / "a")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert run(ListSource(TEXTS), tmp_path / "a") == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == times


@pytest.mark.parametrize("finished", [False, True])
def test_another_source_tokenizer_or_size_is_refused_with_what_differs(tmp_path: Path, finished: bool) -> None:
    def report(progress: Progress) -> None:
        if not finished and progress.shards:
            raise Killed

    with contextlib.nullcontext() if finished else pytest.raises(Killed):
        run(ListSource(TEXTS), tmp_path / "a", report=report)

    class Other(ByteTokenizer):
        fingerprint = "other"
        eos_id = 0

    before = files_of(tmp_path / "a")
    with pytest.raises(DataError) as error:
        prepare(ListSource([*TEXTS, "x"]), Other(), tmp_path / "a", workers=0, shard_tokens=301)
    assert str(error.value).splitlines()[1:] == [
        "  source: added: document 60",
        "  tokenizer: was 'titan-data/bytes/1', now 'other'",
        "  eos_id: was 257, now 0",
        "  shard_tokens: was 300, now 301",
        "Choose another folder.",
    ]
    assert files_of(tmp_path / "a") == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"is not empty \(it contains thesis.tex\)"):
        run(ListSource(TEXTS), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    def report(progress: Progress) -> None:
        with pytest.raises(DataError, match="another titan-data prepare is writing to"):
            run(ListSource(TEXTS), tmp_path / "a")
        raise Killed

    with pytest.raises(Killed):
        run(ListSource(TEXTS), tmp_path / "a", report=report)


def test_what_is_kept_must_be_whole(tmp_path: Path, small_batches: None) -> None:
    def report(progress: Progress) -> None:
        if progress.shards == 2:
            raise Killed

    with pytest.raises(Killed):
        run(ListSource(TEXTS), tmp_path / "a", report=report)
    path = tmp_path / "a" / shard_name(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="is corrupt: remove it and all later shards"):
        run(ListSource(TEXTS), tmp_path / "a")
    path.write_bytes(whole)
    (tmp_path / "a" / UNFINISHED).write_text("{")
    with pytest.raises(DataError, match=r"prepare.json is corrupt .*empty the folder"):
        run(ListSource(TEXTS), tmp_path / "a")


@pytest.mark.parametrize("source", [ListSource([]), IterableSource(list)])
def test_no_documents(tmp_path: Path, source: Any) -> None:
    with pytest.raises(DataError, match="has no documents"):
        run(source, tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_no_text_at_all_is_so_many_empty_documents(tmp_path: Path) -> None:
    run(ListSource(["", ""]), tmp_path / "a")
    shards = TokenShards(tmp_path / "a")
    assert shards.lengths(np.arange(2)).tolist() == [0, 0]
    assert shards[1].tolist() == []


def test_tokens_are_not_prepared_again(tmp_path: Path) -> None:
    run(ListSource(TEXTS), tmp_path / "a")
    with pytest.raises(DataError, match="contains no text"):
        run(TokenShards(tmp_path / "a"), tmp_path / "b")
    with pytest.raises(DataError, match="shard_tokens must be at least 1"):
        prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "b", shard_tokens=0)


def test_progress_counts_up_to_all(tmp_path: Path, small_batches: None) -> None:
    seen = []
    run(ListSource(TEXTS), tmp_path / "a", report=seen.append)
    manifest = run(ListSource(TEXTS), tmp_path / "a")
    assert (seen[0].done, seen[0].tokens) == (0, 0)
    assert (seen[-1].done, seen[-1].total, seen[-1].documents) == (60, 60, 60)
    assert (seen[-1].tokens, seen[-1].new_tokens) == (manifest.tokens, manifest.tokens)
    assert seen[-1].shards == len(manifest.shards)
    assert [p.documents for p in seen] == sorted(p.documents for p in seen)
    run(Stream(TEXTS), tmp_path / "b", report=seen.append)
    assert (seen[-1].done, seen[-1].total) == (3, 5)


def test_huge_documents_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_CHARACTERS_AHEAD", 1000)
    read = []

    class Noting(ListSource):
        def __getitem__(self, index: int) -> str:
            read.append(index)
            return super().__getitem__(index)

    def report(progress: Progress) -> None:
        assert len(read) <= progress.documents + 3

    monkeypatch.setattr(batches, "_BATCH_CHARACTERS", 100)
    run(Noting(["x" * 600] * 40), tmp_path / "a", workers=2, report=report)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_panic_in_a_tokenizer_is_told_with_the_document(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"document 34 cannot be tokenized: PanicError\('index out of bounds'\)"):
        run(ListSource([f"document {i} " for i in range(60)]), tmp_path / "a", workers, PanickingTokenizer())


def test_ctrl_c_in_workers_that_start_is_left_to_the_main_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert run(ListSource(TEXTS), tmp_path / "a", 2, InterruptedWhenLoaded()).documents == len(TEXTS)
    assert "Traceback" not in capfd.readouterr().err
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_progress_moves_within_a_file(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(0)
    for name in ("a", "b"):
        text = "".join(json.dumps({"text": draw.randbytes(500).hex()}) + "\n" for _ in range(7000)).encode()
        (tmp_path / f"{name}.jsonl{suffix}").write_bytes(gzip.compress(text, 1) if suffix else text)
    seen: list[Progress] = []
    source = load_files(tmp_path / "*.jsonl*", streaming=True)
    prepare(source, ByteTokenizer(), tmp_path / "out", workers=0, report=seen.append)
    done = [progress.done for progress in seen]
    assert done[0] == 0
    assert done == sorted(done)
    sizes = sum(file.stat().st_size for file in tmp_path.glob("*.jsonl*"))
    assert (seen[-1].done, seen[-1].total) == (sizes, sizes)
    assert len({number for number in done if number < sizes // 2}) > 2
