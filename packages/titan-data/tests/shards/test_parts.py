"""A corpus that is prepared in parts: for any number of parts the documents and batches of one prepared at once."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_corpus import write_jsonl
from data_flat import flat_loader
from titan_data import ByteTokenizer, DataError, ListSource, Part, TokenShards, load_files, merge_shards, prepare
from titan_data.cli._part_argument import parse_part
from titan_data.shards import batches as batches_of_texts
from titan_data.shards.format import MANIFEST, UNFINISHED
from titan_data.shards.parts import span_of
from titan_data.shards.prepare import Progress
from titan_data.shards.verify import verify_shards

TEXTS = [f"document {i} " * (i * 7 % 11) for i in range(60)]


class Lists:
    """A stream of shards of given sizes; `bytes_before` if their bytes are known."""

    name = "lists"

    def __init__(self, sizes: Sequence[int]) -> None:
        self.shards = len(sizes)
        self._texts = [[f"{shard}: {i}" for i in range(size)] for shard, size in enumerate(sizes)]

    def fingerprint(self) -> Any:
        return ListSource([text for texts in self._texts for text in texts]).fingerprint()

    def iterate(self, shard: int, start: int) -> Iterator[str]:
        yield from self._texts[shard][start:]


class ListsWithBytes(Lists):
    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.bytes_total = sum(sizes)
        self._sizes = sizes

    def bytes_before(self, shard: int) -> int:
        return sum(self._sizes[:shard])

    def bytes_read(self, shard: int) -> int:
        return self.bytes_before(shard)


def prepare_parts(source: Any, folder: Path, count: int) -> None:
    for index in range(count):
        prepare(source, ByteTokenizer(), folder, workers=0, shard_tokens=300, part=Part(index, count))


def documents(folder: Path) -> list[list[int]]:
    shards = TokenShards(folder)
    return [shards[i].tolist() for i in range(len(shards))]


def batches(folder: Path) -> list[Any]:
    loader = flat_loader(TokenShards(folder), ByteTokenizer(), seq_len=64, global_batch_size=2, prefetch=0)
    return [next(loader)["tokens"].tolist() for _ in range(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("files")
    for number in range(7):
        write_jsonl(folder / f"{number}.jsonl", TEXTS[number * number : (number + 1) * (number + 1)])
    return load_files(folder / "*.jsonl", streaming=True)


@pytest.mark.parametrize("kind", ["by index", "stream"])
def test_any_number_of_parts_is_one_corpus(kind: str, files: Any, tmp_path: Path) -> None:
    source = ListSource(TEXTS) if kind == "by index" else files
    prepare(source, ByteTokenizer(), tmp_path / "whole", workers=0, shard_tokens=300)
    expected, order = documents(tmp_path / "whole"), batches(tmp_path / "whole")
    for count in (1, 3, 4, 11):  # more than there are files, too
        folder = tmp_path / str(count)
        prepare_parts(source, folder, count)
        manifest = merge_shards(folder)
        assert documents(folder) == expected
        assert manifest.documents == len(expected)
        assert verify_shards(folder) == []
        assert batches(folder) == order
        assert merge_shards(folder) == manifest
        moved = Path(shutil.move(folder, tmp_path / f"moved-{count}"))
        assert documents(moved) == expected


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), count=st.integers(1, 15), known=st.booleans())
def test_parts_follow_one_another_without_gaps(sizes: list[int], count: int, known: bool) -> None:
    source = ListsWithBytes(sizes) if known else Lists(sizes)
    spans = [span_of(source, Part(index, count)) for index in range(count)]
    assert (spans[0].start, spans[-1].stop) == ((0, 0), (len(sizes), 0))
    assert [span.stop for span in spans[:-1]] == [span.start for span in spans[1:]]
    assert all(span.start <= span.stop for span in spans)
    assert span_of(source, None) == ((0, 0), (len(sizes), 0))
    shares = [sum(sizes[span.start[0] : span.stop[0]]) for span in spans]
    if known:
        # As even as borders between shards allow: each border is at most half a shard away from where it should be.
        assert max(shares) <= sum(sizes) / count + max(sizes)


def test_parts_of_a_stream_are_balanced_by_bytes() -> None:
    spans = [span_of(ListsWithBytes([8, 1, 1, 1, 1, 4]), Part(index, 2)) for index in range(2)]
    assert [(span.start[0], span.stop[0]) for span in spans] == [(0, 1), (1, 6)]


def test_a_part_that_was_stopped_goes_on(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_of_texts, "_BATCH_CHARACTERS", 100)

    class StoppedError(Exception):
        pass

    def stop(progress: Progress) -> None:
        assert progress.done <= progress.total
        if progress.shards == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare(files, ByteTokenizer(), tmp_path / "a", workers=0, shard_tokens=300, part=Part(1, 2), report=stop)
    assert (tmp_path / "a" / "part-00001-of-00002" / UNFINISHED).exists()
    with pytest.raises(DataError, match=r"2 of 2 parts are not finished: 0/2, 1/2 \(begun\)"):
        merge_shards(tmp_path / "a")
    seen: list[Progress] = []
    for index in (1, 0):
        prepare(
            files,
            ByteTokenizer(),
            tmp_path / "a",
            workers=0,
            shard_tokens=300,
            part=Part(index, 2),
            report=seen.append,
        )
        assert seen[-1].done == seen[-1].total
    prepare_parts(files, tmp_path / "b", 2)
    for name in ("part-00000-of-00002", "part-00001-of-00002"):
        assert {path.name: path.read_bytes() for path in (tmp_path / "a" / name).iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / "b" / name).iterdir()
        }


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    def one(text: str, index: int, count: int) -> None:
        prepare(ListSource([text] * 9), ByteTokenizer(), tmp_path / "a", workers=0, part=Part(index, count))

    with pytest.raises(DataError, match="contains no parts"):
        merge_shards(tmp_path / "a")
    one("text", 0, 3)
    one("text", 2, 3)
    with pytest.raises(DataError, match="1 of 3 parts are not finished: 1/3;"):
        merge_shards(tmp_path / "a")
    with pytest.raises(DataError, match="contains parts of 3, not of 4"):
        one("text", 1, 4)
    with pytest.raises(DataError, match="titan-data merge"):
        prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "a", workers=0)
    one("other text", 1, 3)
    with pytest.raises(DataError, match=r"part-00001-of-00003 was prepared from other data:\n  source: edited"):
        merge_shards(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "part-00001-of-00003")
    shutil.copytree(tmp_path / "a" / "part-00000-of-00003", tmp_path / "a" / "part-00001-of-00003")
    with pytest.raises(DataError, match="part-00001-of-00003 does not contain part 1/3: was it renamed"):
        merge_shards(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "part-00000-of-00003", tmp_path / "a" / "part-00000-of-00002")
    with pytest.raises(DataError, match="contains parts of 2 and of 3"):
        merge_shards(tmp_path / "a")
    prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "whole", workers=0)
    with pytest.raises(DataError, match="was not prepared in parts"):
        prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "whole", workers=0, part=Part(0, 2))
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match=f"no part {index} of {count}: the parts are numbered from 0"):
            Part(index, count)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    prepare_parts(ListSource(TEXTS), tmp_path / "a", 2)
    merge_shards(tmp_path / "a")
    shard = tmp_path / "a" / "part-00001-of-00002" / "shard-000000.tokens"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    for open_it in (TokenShards, merge_shards):
        with pytest.raises(DataError, match=r"(?s)part-00001-of-00002.*shard-000000.tokens has \d+ bytes instead of"):
            open_it(tmp_path / "a")
    shard.write_bytes(whole[:4200] + bytes([whole[4200] ^ 1]) + whole[4201:])
    assert [corrupt.file for corrupt in verify_shards(tmp_path / "a")] == ["part-00001-of-00002/shard-000000.tokens"]
    with pytest.raises(DataError, match=r"part-00001-of-00002/shard-000000\.tokens: the checksum does not match"):
        TokenShards(tmp_path / "a", verify=True)[31]
    shard.unlink()
    with pytest.raises(DataError, match=r"part-00001-of-00002/shard-000000\.tokens is missing"):
        TokenShards(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "part-00000-of-00002")
    with pytest.raises(DataError, match=r"part-00000-of-00002/shard-000000\.tokens is missing"):
        TokenShards(tmp_path / "a")


def test_several_folders_are_one_source(tmp_path: Path) -> None:
    for name, texts in (("a", TEXTS[:25]), ("b", TEXTS[25:26]), ("c", TEXTS[26:])):
        prepare(ListSource(texts), ByteTokenizer(), tmp_path / name, workers=0, shard_tokens=300)
    prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "whole", workers=0)
    joined, whole = TokenShards([tmp_path / name for name in "abc"]), TokenShards(tmp_path / "whole")
    assert joined.name == "a+b+c"
    assert (len(joined), joined.tokens) == (len(whole), whole.tokens)
    assert [joined[i].tolist() for i in range(60)] == [whole[i].tolist() for i in range(60)]
    mixed = [59, 3, 25, 26, 24, 0, 3]
    for indices in (mixed, [], list(range(60))):
        array = np.array(indices, dtype=np.int64)
        assert joined.lengths(array).tolist() == whole.lengths(array).tolist()
    loaders = [
        flat_loader(TokenShards(paths, name="web"), None, seq_len=64, global_batch_size=2, prefetch=0)
        for paths in ([tmp_path / name for name in "abc"], tmp_path / "whole")
    ]
    for _ in range(4):
        assert next(loaders[0])["tokens"].tolist() == next(loaders[1])["tokens"].tolist()


def test_folders_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    class WithoutEnd(ByteTokenizer):
        eos_id = None
        fingerprint = "bytes without eos"

    prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "a", workers=0)
    prepare(ListSource(TEXTS), WithoutEnd(), tmp_path / "b", workers=0)
    with pytest.raises(DataError, match="made with different tokenizers: tokenizer is 'titan-data/bytes/1'"):
        TokenShards([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(DataError, match="no folder"):
        TokenShards([])


ARRAY = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "16"}


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("3/16", {}, Part(3, 16)),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_STEP": "2"}, Part(2, 4)),
        ("auto/16", {"JOB_COMPLETION_INDEX": "5"}, Part(5, 16)),
    ],
)
def test_the_part_of_a_task(text: str, environment: dict[str, str], part: Part) -> None:
    assert parse_part(text, environment) == part


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("3", {}, "--part 3: write index/count"),
        ("-1/2", {}, "--part -1/2: write index/count"),
        ("16/16", {}, "no part 16 of 16: the parts are numbered from 0"),
        ("auto", {}, "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set"),
        ("auto", {"JOB_COMPLETION_INDEX": "5"}, "write auto/N"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "14"}, "4 tasks from 10 to 16, with gaps"),
    ],
)
def test_a_part_that_cannot_be_known(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_part(text, environment)


def test_unfinished_parts_are_no_corpus(tmp_path: Path) -> None:
    prepare_parts(ListSource(TEXTS), tmp_path / "a", 2)
    with pytest.raises(DataError, match=f"it has no {MANIFEST}.*titan-data merge"):
        TokenShards(tmp_path / "a")
