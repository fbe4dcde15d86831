"""Files for the tests of sources: the same records in every format and compression."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from titan_data import StreamSource

TEXTS = [
    "plain",
    "",
    "two\nlines and a tab\t",
    "ümläut 漢字 🙂",
    '"quoted" \\ back',
    "x" * 3000,
    "\u2028 is no line end, nor is \x85 or \x0b",
] + [f"record {i} " + "word " * (i % 7) for i in range(40)]


def compress(data: bytes, compression: str | None) -> bytes:
    if compression == "gz":
        half = len(data) // 2
        return gzip.compress(data[:half]) + gzip.compress(data[half:])  # two members, as parallel tools write
    if compression == "zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


def write_jsonl(
    path: Path, texts: list[str], compression: str | None = None, line_end: str = "\n", key: str = "text"
) -> Path:
    lines = line_end.join(json.dumps({"id": i, key: t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts))
    return write_bytes(path, (lines + line_end * bool(texts)).encode(), compression)


def write_bytes(path: Path, data: bytes, compression: str | None = None) -> Path:
    path = path.with_name(path.name + (f".{compression}" if compression else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(data, compression))
    return path


def write_parquet(path: Path, texts: list[str], key: str = "text", codec: str = "snappy", rows: int = 7) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(texts))), key: pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, path, row_group_size=rows, compression=codec)
    return path


def read_rows(source: Any) -> list[str]:
    return [source[i] for i in range(len(source))]


def read_shards(source: StreamSource) -> list[list[str]]:
    return [list(source.iterate(shard, 0)) for shard in range(source.shards)]


def deal(items: list[Any], shards: int) -> list[list[Any]]:
    """The order of a loader: one of each shard in turn."""
    return [items[shard::shards] for shard in range(shards)]
