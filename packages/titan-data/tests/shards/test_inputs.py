"""prepare: input files that are edited between an interruption and the resume, or on the way, are noticed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titan_data import ByteTokenizer, DataError, StdlibSource, load_files, prepare
from titan_data.shards.format import INPUTS, MANIFEST, UNFINISHED
from titan_data.shards.prepare import Progress

LINES = 6000
MIDDLE = slice(300_000, 360_000)


class StoppedError(Exception):
    pass


def write(path: Path, word: str) -> None:
    """Write a file, and edit a part in its middle that keeps the size."""
    text = "".join(json.dumps({"text": f"{i:06d} " + "old " * 25}) + "\n" for i in range(LINES))
    text = text[: MIDDLE.start] + text[MIDDLE].replace("old", word) + text[MIDDLE.stop :]
    path.write_text(text)


def after(shards: int, action: Callable[[], object]) -> Callable[[Progress], None]:
    done = []

    def report(progress: Progress) -> None:
        if progress.shards >= shards and not done:
            done.append(True)
            action()

    return report


def stop() -> None:
    raise StoppedError


def run(path: Path, folder: Path, *, streaming: bool = True, **options: Any) -> dict[str, bytes]:
    source = load_files(path, streaming=streaming)
    prepare(source, ByteTokenizer(), folder, workers=0, shard_tokens=100_000, **options)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def is_edited(path: Path, folder: Path, **options: Any) -> bool:
    try:
        run(path, folder, **options)
    except DataError as error:
        message = str(error)
    else:
        return False
    assert "prepared from files that have been edited since" in message
    assert f"\n  {path.name}: was " in message
    assert "Choose another folder, or restore the files" in message
    return True


@pytest.mark.parametrize("streaming", [True, False])
def test_a_file_edited_between_an_interruption_and_the_resume(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "in.jsonl"
    write(path, "old")
    before = path.stat()
    unbroken = run(path, tmp_path / "unbroken", streaming=streaming)
    with pytest.raises(StoppedError):
        run(path, tmp_path / "out", streaming=streaming, report=after(3, stop))
    write(path, "NEW")
    assert path.stat().st_size == before.st_size
    for _ in range(2):
        assert is_edited(path, tmp_path / "out", streaming=streaming)
    write(path, "old")
    assert is_edited(path, tmp_path / "out", streaming=streaming)  # it cannot be known to be the same
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(path, tmp_path / "out", streaming=streaming) == unbroken
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_a_finished_folder_is_not_that_of_an_edited_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write(path, "old")
    assert run(path, tmp_path / "out") == run(path, tmp_path / "out")
    write(path, "NEW")
    assert is_edited(path, tmp_path / "out")


@pytest.mark.parametrize("finished", [False, True])
def test_checksums_tell_copies_from_edits(tmp_path: Path, finished: bool) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    write(path, "old")
    before = path.stat()
    if finished:
        run(path, out, checksum=True)
    else:
        with pytest.raises(StoppedError):
            run(path, out, checksum=True, report=after(2, stop))
    write(path, "NEW")
    assert is_edited(path, out)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_edited(path, out, checksum=True)  # which a time of modification does not show
    write(path, "old")  # the same contents at another time
    assert run(path, out).keys() == run(path, out, checksum=True).keys() >= {MANIFEST, INPUTS}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_file_edited_on_the_way(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "in.jsonl"
    write(path, "old")

    def edit() -> None:
        with path.open("r+b") as file:  # in place, as an editor or rsync --inplace does
            file.seek(MIDDLE.start)
            file.write(b"X" * 10)

    for _ in range(2):
        with pytest.raises(DataError, match=r"in\.jsonl.*(edited while|was changed while|edited since)|edited since"):
            run(path, tmp_path / "out", streaming=streaming, report=after(1, edit))
        assert not (tmp_path / "out" / MANIFEST).exists()


def test_sources_without_files_have_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    prepare(load_files(tmp_path / "a.txt"), ByteTokenizer(), tmp_path / "files", workers=0)
    prepare(StdlibSource(), ByteTokenizer(), tmp_path / "stdlib", workers=0)
    assert (tmp_path / "files" / INPUTS).exists()
    assert not (tmp_path / "stdlib" / INPUTS).exists()
