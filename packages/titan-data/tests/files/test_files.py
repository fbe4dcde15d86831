"""load_files: every format and compression, in order and in any order, from any place on."""

import gc
import json
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_corpus import TEXTS, compress, read_rows, read_shards, write_bytes, write_jsonl, write_parquet
from data_flat import flat_files, flat_loader
from titan_data import ByteTokenizer, DataError, Fingerprint, Loader, RandomAccessSource, StreamSource
from titan_data.files import lines as lines_module
from titan_data.fingerprint import list_differences

PARTS = [TEXTS[:20], [], TEXTS[20:21], TEXTS[21:]]
ONE_LINE = [re.sub("[\r\n]", " ", text) for text in TEXTS]


def write_corpus(folder: Path, kind: str) -> tuple[Path, dict[str, Any], list[list[str]]]:
    """Four files, one of them empty; returns the options to open them, and the records of each."""
    name, _, compression = kind.partition(".")
    folder.mkdir(exist_ok=True)
    suffix = {"jsonl": "jsonl", "lines": "txt", "paragraphs": "txt", "whole": "txt"}.get(name, "parquet")
    for number, part in enumerate(PARTS):
        path = folder / f"part-{number + 8}.{suffix}"  # 8, 9, 10, 11: not in the order of the alphabet
        if name == "jsonl":
            write_jsonl(path, part, compression, line_end="\r\n" if number % 2 else "\n")
        elif name == "lines":
            text = "\n".join(re.sub("[\r\n]", " ", text) for text in part)
            write_bytes(path, text.encode(), compression)  # no line end at the end
        elif name == "paragraphs":
            text = "\n\n".join(text for text in part if text)
            write_bytes(path, ("\n\r\n" + text + "\n" * number).encode(), compression)
        elif name == "whole":
            write_bytes(path, "\n".join(part).encode(), compression)
        else:
            write_parquet(path, part, codec=name)
    options = {"lines": {"text_unit": "line"}, "paragraphs": {"text_unit": "paragraph"}}.get(name, {})
    records = {
        "lines": [[re.sub("[\r\n]", " ", text) for text in part] for part in PARTS],
        "paragraphs": [[text for text in part if text] for part in PARTS],
        "whole": [["\n".join(part)] for part in PARTS],
    }.get(name, PARTS)
    return folder / "*", options, records


PLAIN = ["jsonl", "lines", "paragraphs", "whole", "none", "snappy", "gzip", "zstd"]
PACKED = [f"{kind}.{c}" for kind in ("jsonl", "lines", "paragraphs", "whole") for c in ("gz", "zst")]


@pytest.mark.parametrize("shards", [1, 3, 32])
@pytest.mark.parametrize("kind", PLAIN + PACKED)
def test_a_stream_from_any_place(tmp_path: Path, kind: str, shards: int) -> None:
    pattern, options, parts = write_corpus(tmp_path / "corpus", kind)
    source = flat_files(pattern, streaming=True, shards=shards, on_malformed="raise", **options)
    assert isinstance(source, StreamSource)
    assert not isinstance(source, RandomAccessSource)
    assert source.shards == min(shards, 4)
    for shard in range(source.shards):
        expected = [text for part in parts[shard :: source.shards] for text in part]
        assert list(source.iterate(shard, 0)) == expected
        fresh = flat_files(pattern, streaming=True, shards=shards, **options)  # knows no counts of records yet
        for start in {0, 1, 2, len(expected) - 1, len(expected), len(expected) + 3, 6, 13, 20, 21, 22}:
            if start >= 0:
                assert list(source.iterate(shard, start)) == expected[start:]
                assert list(fresh.iterate(shard, start)) == expected[start:]


@pytest.mark.parametrize("kind", [*PLAIN, "whole.gz", "whole.zst"])
def test_any_order(tmp_path: Path, kind: str) -> None:
    pattern, options, parts = write_corpus(tmp_path / "corpus", kind)
    source = flat_files(pattern, on_malformed="raise", **options)
    assert isinstance(source, RandomAccessSource)
    expected = [text for part in parts for text in part]
    assert len(source) == len(expected)
    for index in np.random.default_rng(0).permutation(len(expected)):
        assert source[int(index)] == expected[index]
    for index in (-1, len(expected)):
        with pytest.raises(IndexError):
            source[index]
    again = pickle.loads(pickle.dumps(source))
    assert read_rows(again) == expected


@pytest.mark.parametrize("kind", ["jsonl.gz", "lines.zst", "paragraphs.gz"])
def test_what_cannot_be_read_in_any_order_says_so(tmp_path: Path, kind: str) -> None:
    pattern, options, _ = write_corpus(tmp_path / "corpus", kind)
    with pytest.raises(DataError, match=r"part-8.*compressed.*streaming=True"):
        flat_files(pattern, **options)


@given(
    lines=st.lists(st.sampled_from(["", "a", "\r", "word", "é", " ", "\ufeff"]), max_size=12),
    ends=st.lists(st.sampled_from(["\n", "\r\n"]), min_size=12, max_size=12),
    ended=st.booleans(),
    piece=st.integers(1, 9),
    unit=st.sampled_from(["line", "paragraph"]),
)
@settings(max_examples=80, deadline=None)
def test_the_index_finds_the_records_that_the_stream_gives(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends: list[str], ended: bool, piece: int, unit: str
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    whole = "".join(line + end for line, end in zip(lines, ends, strict=False))
    path.write_bytes((whole if ended else whole.rstrip("\r\n")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "_SCAN", piece)
        rows = read_rows(flat_files(path, text_unit=unit))
    stream = flat_files(path, text_unit=unit, streaming=True)
    assert rows == list(stream.iterate(0, 0))
    for start in range(len(rows) + 2):
        assert list(stream.iterate(0, start)) == rows[start:]
    if unit == "line" and ended:
        assert len(rows) == whole.count("\n")


@pytest.mark.slow
def test_a_record_of_50_mb_and_files_that_are_all_of_one_line(tmp_path: Path) -> None:
    big = "0123456789" * 5_000_000
    path = write_jsonl(tmp_path / "big.jsonl", ["before", big, "after"])
    packed = tmp_path / "big.jsonl.gz"
    packed.write_bytes(compress(path.read_bytes(), "gz"))
    source = flat_files(path)
    assert [len(source[i]) for i in range(3)] == [6, 50_000_000, 5]
    assert source[1] == big
    for stream in (flat_files(path, streaming=True), flat_files(packed, streaming=True)):
        assert [len(text) for text in stream.iterate(0, 0)] == [6, 50_000_000, 5]
        assert list(stream.iterate(0, 2)) == ["after"]


def test_byte_order_mark(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    jsonl = write_bytes(tmp_path / "a.jsonl", mark + b'{"text": "a"}\n{"text": "b"}')
    text = write_bytes(tmp_path / "a.txt", mark + b"a\nb")
    assert read_rows(flat_files(jsonl, on_malformed="raise")) == ["a", "b"]
    assert list(flat_files(jsonl, on_malformed="raise", streaming=True).iterate(0, 0)) == ["a", "b"]
    assert read_rows(flat_files(text, text_unit="line")) == ["a", "b"]
    assert read_rows(flat_files(text)) == ["a\nb"]


def test_null_and_blank_lines_are_empty_documents(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": null}\n  \r\n{"text": "b", "n": NaN}\n')
    for source in (flat_files(path, on_malformed="raise"), flat_files(path, on_malformed="raise", streaming=True)):
        rows = read_rows(source) if isinstance(source, RandomAccessSource) else read_shards(source)[0]
        assert rows == ["a", "", "", "", "b"]


def test_all_empty_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_bytes(tmp_path / name, b"")
    assert len(flat_files(tmp_path / "*.jsonl")) == 0
    assert read_shards(flat_files(tmp_path / "*.jsonl", streaming=True)) == [[], []]


@pytest.mark.parametrize("kind", ["jsonl", "whole", "jsonl.gz", "snappy"])
def test_the_memory_file_system(tmp_path: Path, kind: str) -> None:
    pattern, options, parts = write_corpus(tmp_path / "corpus", kind)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "corpus").iterdir():
        memory.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    url = f"memory://{tmp_path.name}/part-*"
    expected = [text for part in parts for text in part]
    stream = flat_files(url, streaming=True, shards=1, **options)
    assert list(stream.iterate(0, 0)) == expected
    assert list(stream.iterate(0, 25)) == expected[25:]
    local = flat_files(pattern, streaming=True, shards=1, **options)
    assert stream.fingerprint() == local.fingerprint()
    if kind == "jsonl":
        with pytest.raises(DataError, match=r"is remote.*streaming=True"):
            flat_files(url)
    elif kind != "jsonl.gz":
        assert read_rows(flat_files(url, **options)) == expected


def test_the_order_of_files(tmp_path: Path) -> None:
    names = ["b/2.txt", "b/10.txt", "b/1.txt", "a.txt", "b10/1.txt", "b9/1.txt", "c/01.txt", "c/1.txt"]
    for name in names:
        write_bytes(tmp_path / name, name.encode())
    expected = ["a.txt", "b/1.txt", "b/2.txt", "b/10.txt", "b9/1.txt", "b10/1.txt", "c/01.txt", "c/1.txt"]
    assert read_rows(flat_files(tmp_path / "**/*.txt")) == expected
    given = [tmp_path / "c" / "1.txt", tmp_path / "b" / "*.txt", tmp_path / "b" / "1.txt"]
    source = flat_files(given)
    assert read_rows(source) == ["c/1.txt", "b/1.txt", "b/2.txt", "b/10.txt"]
    assert [name for name, _ in source.fingerprint().items] == ["1.txt", "1.txt (2)", "2.txt", "10.txt"]


def test_home_relative_and_strange_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_bytes(tmp_path / "data" / "a [1]?.txt", b"a")
    write_bytes(tmp_path / "data" / ".hidden.txt", b"no")
    write_bytes(tmp_path / "data" / ".git" / "b.txt", b"no")
    for pattern in ("~/data/*.txt", "data/*.txt", "./data/**/*.txt", "data/a [1]?.txt"):
        assert read_rows(flat_files(pattern)) == ["a"]
    assert read_rows(flat_files("data/.hidden.txt")) == ["no"]
    assert read_rows(flat_files("data/.*.txt")) == ["no"]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (
            "data/*.parquet",
            r"no file matches .*data/\*\.parquet; .*/data contains notes, one\.jsonl, two\.jsonl",
        ),
        ("data/onr.jsonl", r"file .*onr\.jsonl does not exist; .*/data contains one\.jsonl, two\.jsonl and 1 more"),
        ("dada/sub/*.jsonl", r"no file matches .*; .* contains data"),
        ("data", r"data is a folder: name its files, such as .*data/\*\*/\*\.jsonl"),
        ("nowhere://a.jsonl", r"nowhere://a\.jsonl cannot be opened: .*nowhere"),
        ("memory://nothing/*.jsonl", r"no file matches memory://nothing/\*\.jsonl"),
    ],
)
def test_a_pattern_that_finds_nothing_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data" / "one.jsonl", ["a"])
    write_jsonl(tmp_path / "data" / "two.jsonl", ["a"])
    (tmp_path / "data" / "notes").mkdir()
    with pytest.raises(DataError, match=says):
        flat_files(pattern)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_bytes(tmp_path / "b.txt", b"a")
    write_bytes(tmp_path / "c.bin", b"a")
    write_bytes(tmp_path / "d.parquet.gz", b"a")
    with pytest.raises(DataError, match=r"several formats: .*a\.jsonl \(jsonl\), .*b\.txt \(text\)"):
        flat_files(tmp_path / "[ab].*")
    with pytest.raises(DataError, match=r"c\.bin: the format cannot be inferred"):
        flat_files(tmp_path / "c.bin")
    assert read_rows(flat_files(tmp_path / "c.bin", format="text")) == ["a"]
    with pytest.raises(DataError, match=r"format must be .* not 'csv'"):
        flat_files(jsonl, format="csv")
    with pytest.raises(DataError, match=r"text_unit must be .* not 'word'"):
        flat_files(tmp_path / "b.txt", text_unit="word")
    with pytest.raises(DataError, match=r"on_malformed must be .* not 'ignore'"):
        flat_files(jsonl, on_malformed="ignore")
    with pytest.raises(DataError, match="at least 1 shard"):
        flat_files(jsonl, streaming=True, shards=0)
    with pytest.raises(DataError, match="at least one path"):
        flat_files([])
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"d\.parquet\.gz: Parquet is compressed inside"):
        flat_files(tmp_path / "d.parquet.gz", streaming=True)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_key_names_those_there_are(tmp_path: Path, kind: str) -> None:
    write = write_jsonl if kind == "jsonl" else write_parquet
    path = write(tmp_path / f"a.{kind}", ["a"], key="content")
    for streaming in (False, True):
        with pytest.raises(
            DataError, match=rf"a\.{kind} has no .*'text'.*set text_key to one of: .*content, id|id, co"
        ):
            flat_files(path, streaming=streaming)
    assert read_rows(flat_files(path, text_key="content")) == ["a"]


def test_a_json_array_is_refused(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.json", json.dumps([{"text": "a"}], indent=1).encode())
    with pytest.raises(DataError, match="begins with a JSON array"):
        flat_files(path)


@pytest.mark.parametrize("extra", ["zst", "parquet"])
def test_without_the_extra_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    name = "a.jsonl.zst" if extra == "zst" else "a.parquet"
    monkeypatch.setitem(__import__("sys").modules, "zstandard" if extra == "zst" else "pyarrow.parquet", None)
    path = write_bytes(tmp_path / name, b"whatever")
    with pytest.raises(DataError, match=rf"pip install 'titan-data\[{extra if extra == 'parquet' else 'zstd'}\]'"):
        flat_files(path, streaming=True)


def test_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "wiki" / "a.jsonl", ["a"])
    assert flat_files(tmp_path / "wiki" / "a.jsonl").name == "a.jsonl"
    assert flat_files(tmp_path / "wiki" / "*.jsonl").name == "wiki/*.jsonl"
    assert flat_files([tmp_path / "wiki" / "*.jsonl"], name="wiki").name == "wiki"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "snappy", "whole"])
def test_fingerprints_say_what_has_changed(tmp_path: Path, kind: str, streaming: bool) -> None:
    pattern, options, _ = write_corpus(tmp_path / "corpus", kind)
    folder = tmp_path / "corpus"

    def fingerprint(pattern: Any = pattern, **changes: Any) -> Fingerprint:
        return flat_files(pattern, **{"streaming": streaming, **options, **changes}).fingerprint()

    before = fingerprint()
    for path in folder.iterdir():
        os.utime(path, (1, 1))  # copies have other times
    folder.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved" / "*") == before
    (tmp_path / "moved").rename(folder)
    last = folder / f"part-11.{'txt' if kind == 'whole' else 'parquet' if kind == 'snappy' else 'jsonl'}"
    data = last.read_bytes()
    assert list_differences(before, fingerprint([*sorted(folder.iterdir())[::-1]]))[0].startswith("reordered: ")
    assert fingerprint(streaming=not streaming) != before
    if streaming:
        assert list_differences(before, fingerprint(shards=2)) == ["shards: was 4, now 2"]
    if kind == "jsonl":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("titan_data.files.jsonl.JsonLines.check", lambda self, file, head: None)
            assert list_differences(before, fingerprint(text_key="id")) == ["text_key: was 'text', now 'id'"]
    last.rename(folder / last.name.replace("11", "12"))
    assert list_differences(before, fingerprint()) == [
        f"added: {last.name.replace('11', '12')}",
        f"removed: {last.name}",
    ]
    (folder / last.name.replace("11", "12")).unlink()
    if kind != "snappy":
        last.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])  # the same size
        assert list_differences(before, fingerprint(on_malformed="skip")) == [f"edited: {last.name}"]


@pytest.mark.parametrize("at", [0, 65_535, 434_464, 499_999, None])
def test_an_edit_at_either_end_or_of_the_size_shows(tmp_path: Path, at: int | None) -> None:
    data = bytearray(b"x" * 500_000)
    path = write_bytes(tmp_path / "a.txt", data)
    before = flat_files(path).fingerprint()
    if at is None:
        data[250_000:250_000] = b"x"
    else:
        data[at] = ord("y")
    path.write_bytes(data)
    assert list_differences(before, flat_files(path).fingerprint()) == ["edited: a.txt"]


def test_a_file_that_changes_or_disappears_while_it_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    rows, stream = flat_files(path), flat_files(path, streaming=True)
    assert rows[3] == TEXTS[3]
    saved = path.read_bytes()
    for change in (saved[:-9], saved + b"\n", saved.replace(b"plain", b"PLAIN")):
        path.write_bytes(change)
        os.utime(path, (5, 5))
        for read in (lambda: rows[3], lambda: list(stream.iterate(0, 0)), lambda: pickle.loads(pickle.dumps(rows))[3]):
            with pytest.raises(DataError, match=r"a\.jsonl was changed while it was in use"):
                read()
    path.unlink()
    for read in (lambda: list(stream.iterate(0, 0)), lambda: pickle.loads(pickle.dumps(rows))[3]):
        with pytest.raises(DataError, match=r"a\.jsonl has disappeared"):
            read()


def test_files_are_closed_and_few_are_open_at_a_time(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts open files in /proc")
    for number in range(100):
        write_jsonl(tmp_path / f"{number}.jsonl", ["a", "b"])
    opened = lambda: len([*Path("/proc/self/fd").iterdir()])  # noqa: E731
    gc.collect()  # what other tests left behind
    before = opened()
    rows = flat_files(tmp_path / "*.jsonl")
    read_rows(rows)
    assert opened() - before <= 64
    del rows
    stream = flat_files(tmp_path / "*.jsonl", streaming=True)
    iterators = [stream.iterate(shard, 1) for shard in range(stream.shards)]
    assert [next(iterator) for iterator in iterators] == ["b"] * 32
    for iterator in iterators:
        iterator.close()
    assert opened() <= before


def test_an_index_folder_spares_the_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, _, parts = write_corpus(tmp_path / "corpus", "jsonl")
    expected = [text for part in parts for text in part]
    folder = tmp_path / "index" / "deep"
    assert read_rows(flat_files(pattern, index_directory=folder)) == expected
    assert len(list(folder.iterdir())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(lines_module.LineFormat, "_scan", lambda self, file: pytest.fail("scanned again"))
        assert read_rows(flat_files(pattern, index_directory=folder)) == expected
    for index in folder.iterdir():
        index.write_bytes(index.read_bytes()[:-8])  # corrupt: built again
    assert read_rows(flat_files(pattern, index_directory=folder)) == expected
    for index in folder.iterdir():
        np.save(index, np.array([0, 1]))  # of another file
    assert read_rows(flat_files(pattern, index_directory=folder)) == expected
    path = tmp_path / "corpus" / "part-8.jsonl"
    path.write_bytes(path.read_bytes().replace(b"plain", b'"}\n{"'))  # as long as before
    os.utime(path, (5, 5))
    assert len(flat_files(pattern, index_directory=folder)) == len(expected) + 1


def test_an_index_folder_lets_a_stream_pass_over_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, _, parts = write_corpus(tmp_path / "corpus", "jsonl.gz")
    folder = tmp_path / "index"
    expected = [text for part in parts for text in part]
    assert list(flat_files(pattern, streaming=True, shards=1, index_directory=folder).iterate(0, 0)) == expected
    resumed = flat_files(pattern, streaming=True, shards=1, index_directory=folder)
    opened = []
    original = lines_module.open_bytes
    monkeypatch.setattr(
        lines_module, "open_bytes", lambda file, retry: opened.append(file.name) or original(file, retry)
    )
    assert list(resumed.iterate(0, 25)) == expected[25:]
    assert opened == ["part-11.jsonl.gz"]
    with pytest.raises(DataError, match=r"index_directory .* cannot be created"):
        flat_files(pattern, streaming=True, index_directory=tmp_path / "corpus" / "part-8.jsonl.gz")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "snappy", "paragraphs.zst"])
def test_a_loader_goes_on_with_files_on_another_number_of_ranks(tmp_path: Path, kind: str) -> None:
    pattern, options, _ = write_corpus(tmp_path / "corpus", kind)
    if kind.startswith("jsonl"):
        write_bytes(tmp_path / "corpus" / "part-9.jsonl", b'{"text": "good"}\nbad\n{"text": "good"}', kind[6:])
    streaming = kind != "jsonl"

    def ranks(world_size: int) -> list[Loader]:
        source = flat_files(pattern, streaming=streaming, shards=3, **options)  # as a new process would
        sizes = {"seq_len": 64, "global_batch_size": 6, "seed": 1, "world_size": world_size, "prefetch": 0}
        return [flat_loader(source, ByteTokenizer(), rank=rank, **sizes) for rank in range(world_size)]

    def read(loaders: list[Loader]) -> list[Any]:
        return [np.concatenate([next(loader)["tokens"].numpy() for loader in loaders]).tolist() for _ in range(9)]

    (whole,) = ranks(1)
    batches = read([whole]) + read([whole]) + read([whole])
    (name,) = whole.accounting()
    assert whole.accounting()[name]["epoch"] > 1
    stopped = ranks(1)
    resumed = read(stopped)
    for world_size in (3, 2):
        state = json.loads(json.dumps(stopped[0].state_dict()))
        stopped = ranks(world_size)
        for loader in stopped:
            loader.load_state_dict(state)
        resumed += read(stopped)
    assert resumed == batches
    next((tmp_path / "corpus").glob("part-11*")).unlink()
    with pytest.raises(DataError, match=r"removed: part-11"):
        ranks(1)[0].load_state_dict(state)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corrupt_index_is_made_again(tmp_path: Path, streaming: bool, seed: int) -> None:
    """Whatever has happened to it: an index is never the reason of an error or of other records."""
    draw = random.Random(seed)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, "gz" if streaming else None)
    folder = tmp_path / "index"
    options = {"streaming": streaming, "index_directory": folder, **({"shards": 1} if streaming else {})}

    def read() -> list[str]:
        source = flat_files(path, **options)
        return [*source.iterate(0, 0)] if streaming else read_rows(source)

    assert read() == TEXTS
    write_jsonl(tmp_path / "b.jsonl", ["x", "y"])
    (index,) = folder.iterdir()
    whole = index.read_bytes()
    damages = [b"", whole[:20], whole[:-8], whole + b"0", b"[" * 100_000, b"\x93NUMPY" + bytes(200), bytes(len(whole))]
    for _ in range(60):
        at = draw.randrange(len(whole))
        damages.append(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
    for damage in damages:
        index.write_bytes(damage)
        if streaming:  # which passes over complete files
            assert [*flat_files([path, path.with_name("b.jsonl")], **options).iterate(0, len(TEXTS) + 1)] == ["y"]
        assert read() == TEXTS
