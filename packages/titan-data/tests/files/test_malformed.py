"""Records that cannot be used: named by file and line, counted, and of no influence on the others' places."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from data_corpus import compress, read_rows, read_shards, write_bytes, write_jsonl, write_parquet
from data_flat import flat_files
from titan_data import DataError, RandomAccessSource

BAD_LINES = {
    "cut off": (b'{"text": "a', "invalid JSON: Unterminated string"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "invalid JSON: Extra data"),
    "no object": (b'["text"]', "a JSON list, not an object"),
    "a number": (b"17", "a JSON int, not an object"),
    "no key": (b'{"id": 1, "body": "a"}', "an object without 'text'; its keys are 'id', 'body'"),
    "empty object": (b"{}", "an object without 'text'; it is empty"),
    "a list for text": (b'{"text": ["a"]}', "'text' is of type list, not a string"),
    "a number for text": (b'{"text": 3}', "'text' is of type int, not a string"),
    "invalid UTF-8": (b'{"text": "a\xff"}', "invalid UTF-8: invalid start byte at byte 11"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "invalid UTF-8"),
    "deeply nested": (b'{"text": ' + b"[" * 200_000, "invalid JSON: nested too deeply"),
    "a huge number": (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "digits"),
    "a NUL": (b"\x00" * 20, "invalid JSON"),
}


def read_all(source: Any) -> list[Any]:
    return read_rows(source) if isinstance(source, RandomAccessSource) else read_shards(source)[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_empty_named_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str, streaming: bool
) -> None:
    line, why = BAD_LINES[bad]
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    source = flat_files(path, streaming=streaming, name="mine")
    with caplog.at_level(logging.WARNING, logger="titan_data"):
        assert read_all(source) == ["one", "", "three"]
        assert read_all(source) == ["one", "", "three"]  # a second epoch
    assert source.malformed == 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"source mine: skipped a malformed record: {path}, line 2: ")
    assert why in message
    if streaming:
        assert list(source.iterate(0, 2)) == ["three"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_stops_where_it_is_to(tmp_path: Path, bad: str, streaming: bool) -> None:
    line, why = BAD_LINES[bad]
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    source = flat_files(path, streaming=streaming, on_malformed="raise")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{re.escape(why)}.*on_malformed=\"skip\""):
        read_all(source)
    assert (list(source.iterate(0, 2)) if streaming else [source[2]]) == ["three"]


def test_many_are_named_at_first_and_counted_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "a"}\n' + b"bad\n" * 1234)
    source = flat_files(path, streaming=True)
    with caplog.at_level(logging.WARNING, logger="titan_data"):
        assert len(read_all(source)) == 1235
    assert source.malformed == 1234
    messages = [record.getMessage() for record in caplog.records]
    assert [re.search(r"line \d+|skipped \d+", message)[0] for message in messages] == [
        *[f"line {i}" for i in range(2, 7)],
        "skipped 10",
        "skipped 100",
        "skipped 1000",
    ]
    assert messages[4].endswith("further ones are only counted")


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_is_not_utf_8(tmp_path: Path, unit: str, streaming: bool) -> None:
    write_bytes(tmp_path / "a.txt", b"good\n\nb\xffd\n")
    write_bytes(tmp_path / "b.txt", b"last")
    options = {"text_unit": unit, "streaming": streaming}
    expected = {"file": ["", "last"], "line": ["good", "", "", "last"], "paragraph": ["good", "", "last"]}[unit]
    source = flat_files(tmp_path / "*.txt", **options, shards=1)
    assert read_all(source) == expected
    assert source.malformed == 1
    where = {"file": "", "line": ", line 3", "paragraph": ", paragraph 2"}[unit]
    with pytest.raises(DataError, match=rf"a\.txt{where}: invalid UTF-8: invalid start byte at byte"):
        read_all(flat_files(tmp_path / "*.txt", **options, shards=1, on_malformed="raise"))


DAMAGES = ("cut off", "cut in the header", "flipped", "garbage behind", "not packed at all")


def damaged(whole: bytes, compression: str, damage: str) -> bytes:
    packed = compress(whole, compression)
    return {
        "cut off": packed[:-40],
        "cut in the header": packed[:3],
        "flipped": packed[: len(packed) // 4] + b"\xff\xff\xff\xff" * 4 + packed[len(packed) // 4 + 16 :],
        "garbage behind": packed + b"garbage",
        "not packed at all": whole,
    }[damage]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_corrupt_compressed_file_ends_there_and_the_next_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, compression: str, damage: str
) -> None:
    texts = [f"{i} {i * 2654435761 % 1000003}" for i in range(5000)]
    whole = write_jsonl(tmp_path / "whole.jsonl", texts).read_bytes()
    write_bytes(tmp_path / f"a.jsonl.{compression}", damaged(whole, compression, damage))
    write_jsonl(tmp_path / "b.jsonl", texts, compression)
    pattern = tmp_path / "[ab].jsonl.*"
    source = flat_files(pattern, streaming=True, shards=1)
    (read,) = read_shards(source)
    assert read[-5000:] == texts
    count = len(read) - 5000
    assert read[:count] == texts[:count]
    if damage == "garbage behind":
        assert count == 5000
    elif damage in ("cut off", "flipped"):
        assert count < 5000
    else:
        assert count == 0
    assert source.malformed == 0  # a file is no record
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"a.jsonl.{compression}, after line {count}: the .{compression} file is" in message
    ((where, why, lost),) = source.unreadable
    assert where.endswith(f"a.jsonl.{compression}, after line {count}")
    assert "truncated" in why or "corrupt" in why
    assert re.search(r"[0-9,]+ (of its [0-9,]+ )?bytes", lost)
    with pytest.raises(DataError, match=r"a\.jsonl.*after line.*on_unreadable_file=\"skip\""):
        read_shards(flat_files(pattern, streaming=True, shards=1, on_unreadable_file="raise"))


@pytest.mark.parametrize(("compression", "unit"), [("gz", "line"), ("zst", "paragraph"), ("gz", "file")])
@pytest.mark.parametrize("damage", DAMAGES)
def test_from_any_record_on_the_same_follows_whatever_is_corrupt_before(
    tmp_path: Path, compression: str, damage: str, unit: str
) -> None:
    texts = [f"{i} {i * 2654435761 % 1000003}" for i in range(600)]
    between = "\n\n" if unit == "paragraph" else "\n"
    whole = between.join(texts).encode()
    for name in ("a", "c"):
        write_bytes(tmp_path / f"{name}.txt.{compression}", damaged(whole, compression, damage))
    for name in ("b", "d"):
        write_bytes(tmp_path / f"{name}.txt", between.join(texts[:10]).encode(), compression)

    def open_stream(index_directory: Path | None = None) -> Any:
        pattern = tmp_path / "*.txt.*"
        return flat_files(pattern, streaming=True, shards=1, text_unit=unit, index_directory=index_directory)

    source = open_stream()
    (read,) = read_shards(source)
    half = len(read) // 2  # the last records of b are before it, the first of c after it
    starts = {0, 1, 600, half - 11, half - 10, half - 9, half - 1, half, half + 1, len(read) - 1, len(read)}
    for start in sorted(starts & {*range(len(read) + 1)}):
        assert list(open_stream().iterate(0, start)) == read[start:], start
        again = open_stream(tmp_path / "index")  # which earlier runs have written, wherever they began
        for begin in (start, 0, start):
            assert list(again.iterate(0, begin)) == read[begin:], begin
    assert source.unreadable or (compression, damage) == ("zst", "flipped")  # zstd frames need not have a checksum
    if source.unreadable and unit != "file":  # an index does not hide a corrupt file
        options = {"text_unit": unit, "index_directory": tmp_path / "index", "on_unreadable_file": "raise"}
        with pytest.raises(DataError, match=r"a\.txt"):
            list(flat_files(tmp_path / "*.txt.*", streaming=True, shards=1, **options).iterate(0, len(read)))


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_corrupt_compressed_text_file_is_an_empty_document(tmp_path: Path, compression: str) -> None:
    write_bytes(tmp_path / f"a.txt.{compression}", compress(b"some text " * 100, compression)[:-3])
    source = flat_files(tmp_path / "a.txt.*")
    assert (read_all(source), source.malformed, len(source.unreadable)) == ([""], 0, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_parquet(tmp_path: Path, streaming: bool) -> None:
    texts = [f"row {i} {'x' * 500}" for i in range(50)]
    write_parquet(tmp_path / "b.parquet", texts, rows=10, codec="gzip")
    whole = (tmp_path / "b.parquet").read_bytes()
    pyarrow = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.ParquetFile(tmp_path / "b.parquet").metadata.row_group(2).column(1)
    begin = column.dictionary_page_offset or column.data_page_offset
    flipped = whole[: begin + 30] + b"\xff" * 60 + whole[begin + 90 :]
    write_bytes(tmp_path / "a.parquet", flipped)
    write_bytes(tmp_path / "c.parquet", whole[:-20])  # without its footer
    write_bytes(tmp_path / "d.parquet", b"PAR1")
    write_bytes(tmp_path / "e.parquet", b"")
    write_parquet(tmp_path / "f.parquet", ["other"], key="body")
    write_parquet(tmp_path / "g.parquet", ["last"])
    source = flat_files(tmp_path / "*.parquet", streaming=streaming, shards=1)
    read = read_all(source)
    assert read[:20] + read[30:50] == texts[:20] + texts[30:]
    assert set(read[20:30]) <= {"", *texts[20:30]}
    assert read[29] == ""
    assert read[50:] == [*texts, "last"]
    assert source.malformed == 0
    assert {Path(re.split(", |$", where)[0]).name: lost for where, _, lost in source.unreadable} == {
        "a.parquet": f"{30 - len(read[:30]) + read[20:30].count('')} rows",
        "c.parquet": f"{len(whole) - 20:,} bytes",
        "d.parquet": "4 bytes",
        "f.parquet": "1 rows",
    }
    if streaming:
        for start in (19, 20, 25, 30, 50, 101):
            again = flat_files(tmp_path / "*.parquet", streaming=True, shards=1)
            assert list(again.iterate(0, start)) == read[start:]
    else:
        assert read_all(flat_files(tmp_path / "*.parquet", streaming=True, shards=1)) == read
    for name, says in {"a": "row group 2 from row", "c": "corrupt Parquet", "f": "has no column 'text'"}.items():
        with pytest.raises(DataError, match=rf"{name}\.parquet.*{says}"):
            read_all(flat_files([tmp_path / "g.parquet", tmp_path / f"{name}.parquet"], on_unreadable_file="raise"))


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        table = pyarrow.table({"text": pyarrow.array(["a", None, "a"], pyarrow.string()).cast(kind)})
        parquet.write_table(table, tmp_path / "a.parquet")
        for streaming in (False, True):
            assert read_all(flat_files(tmp_path / "a.parquet", streaming=streaming)) == ["a", "", "a"]
    for values in ([1, 2], [b"a"], [["a"]]):
        parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"no text in column 'text', but .*: set text_key to a column of strings"):
            flat_files(tmp_path / "a.parquet")


def test_parquet_text_that_is_not_utf_8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    binary = pyarrow.array([b"a", b"b\xff", b"c"])
    array = pyarrow.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])
    parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
    for streaming in (False, True):
        source = flat_files(tmp_path / "a.parquet", streaming=streaming)
        assert (read_all(source), source.malformed) == (["a", "", "c"], 1)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: invalid UTF-8"):
        read_all(flat_files(tmp_path / "a.parquet", on_malformed="raise"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_file_is_checked_before_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, streaming: bool
) -> None:
    if kind == "jsonl.gz" and not streaming:
        pytest.skip("compressed files are streams")

    def write(name: str, key: str, record: str) -> None:
        if kind == "parquet":
            write_parquet(tmp_path / f"{name}.parquet", [record] * 50, key=key)
        else:
            write_jsonl(tmp_path / f"{name}.jsonl", [record] * 50, "gz" if kind.endswith("gz") else None, key=key)

    write("1", "text", "a")
    for number in range(2, 10):
        write(str(number), "content", "b" * (200_000 if number == 2 and kind != "parquet" else 10))
    pattern = tmp_path / "*"
    with pytest.raises(DataError, match="8 of 9 files cannot be read") as raised:
        flat_files(pattern, streaming=streaming, on_unreadable_file="raise")
    lines = str(raised.value).splitlines()
    assert [Path(line.split()[0]).name for line in lines[1:6]] == [f"{number}.{kind}" for number in range(2, 7)]
    assert all("no " in line and "'text'" in line and "content" in line and "lost: " in line for line in lines[1:6])
    assert lines[6:] == ["  and 3 more", 'To read the others, set on_unreadable_file to "skip".']
    source = flat_files(pattern, streaming=streaming)
    assert len(source.unreadable) == 8
    assert "2." + kind in caplog.records[0].getMessage()
    (tmp_path / f"1.{kind}").unlink()
    with pytest.raises(DataError, match="8 of 8 files cannot be read"):  # the key is wrong
        flat_files(pattern, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("key", ["meta.text", "meta.deep.text", "a.b", "a.b.text"])
def test_keys_may_be_paths(tmp_path: Path, key: str, streaming: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"meta": {"text": f"1 {i}", "deep": {"text": f"2 {i}"}}, "a.b": f"4 {i}"} for i in range(5)]
    expected = [{"meta.text": f"1 {i}", "meta.deep.text": f"2 {i}", "a.b": f"4 {i}"}.get(key) for i in range(5)]
    records[3]["meta"] = None
    if key.startswith("meta"):
        expected[3] = ""
    write_bytes(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        if key == "a.b.text":
            with pytest.raises(DataError, match=r"'a\.b\.text'.*meta\.deep\.text"):
                flat_files(tmp_path / name, text_key=key, streaming=streaming)
        else:
            source = flat_files(tmp_path / name, text_key=key, streaming=streaming)
            assert (read_all(source), source.malformed) == (expected, 0)
