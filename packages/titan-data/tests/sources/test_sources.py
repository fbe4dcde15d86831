"""ListSource, IterableSource and StdlibSource."""

import sysconfig
from pathlib import Path

import pytest

from data_loader_cases import ListTokens
from titan_data import (
    DataError,
    IterableSource,
    ListSource,
    RandomAccessSource,
    StdlibSource,
    StreamSource,
    TokenSource,
)
from titan_data.sources.base import check_source


def test_each_shape_is_told_from_the_others() -> None:
    list_source, iterable = ListSource(["a", "", "c"], name="mine"), IterableSource(lambda: ["a"])
    assert (list_source.name, len(list_source), [list_source[i] for i in range(3)]) == ("mine", 3, ["a", "", "c"])
    tokens = ListTokens([[1]])
    shapes = (RandomAccessSource, TokenSource, StreamSource)
    assert [isinstance(list_source, shape) for shape in shapes] == [True, False, False]
    assert [isinstance(iterable, shape) for shape in shapes] == [False, False, True]
    assert isinstance(tokens, TokenSource)
    for source in (list_source, iterable, tokens):
        check_source(source)


def test_list_source_keeps_its_own_copy() -> None:
    texts = ["a"]
    source = ListSource(texts)
    texts.append("b")
    assert len(source) == 1


def test_list_fingerprint_tells_texts_order_and_borders_apart() -> None:
    corpora = (["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"], ["ab", "c", ""], ["ab", "\ud800"])
    assert len({ListSource(texts).fingerprint().digest for texts in corpora}) == len(corpora)
    assert ListSource(["x", "y"]).fingerprint() == ListSource(("x", "y"), name="other").fingerprint()


def test_iterable_source_starts_anew_each_time() -> None:
    source = IterableSource(lambda: iter("abcd"), name="letters", version="7")
    assert [list(source.iterate(0, start)) for start in (0, 2, 4, 9)] == [["a", "b", "c", "d"], ["c", "d"], [], []]
    assert (source.name, source.shards) == ("letters", 1)
    assert source.fingerprint() != IterableSource(lambda: iter("abcd"), version="8").fingerprint()


def test_stdlib_has_the_library_and_nothing_else() -> None:
    source = StdlibSource()
    assert isinstance(source, RandomAccessSource)
    assert len(source) > 200
    assert {"json/__init__.py", "dataclasses.py", "asyncio/base_events.py"} <= set(source.paths)
    assert source.paths == sorted(source.paths)
    folders = {folder for path in source.paths for folder in path.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
    assert "JSON (JavaScript Object Notation)" in source[source.paths.index("json/__init__.py")]


def test_stdlib_is_the_same_every_time() -> None:
    assert StdlibSource().fingerprint() == StdlibSource().fingerprint()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_stdlib_files_order_and_bytes(library: Path) -> None:
    (library / "b").mkdir()
    (library / "b" / "test").mkdir()
    (library / "site-packages").mkdir()
    (library / "b.py").write_bytes(b"b = '\xff'")
    (library / "a.py").write_text("a", encoding="utf-8")
    (library / "b" / "c.py").write_text("c", encoding="utf-8")
    for path in ("empty.py", "data.txt", "b/test/t.py", "site-packages/s.py"):
        (library / path).write_text("" if path == "empty.py" else "no", encoding="utf-8")
    source = StdlibSource()
    assert source.paths == ["a.py", "b.py", "b/c.py"]
    assert [source[i] for i in range(3)] == ["a", "b = '\ufffd'", "c"]
    before = source.fingerprint()
    (library / "a.py").write_text("aa", encoding="utf-8")
    assert StdlibSource().fingerprint() != before


def test_stdlib_without_files_says_what_to_do(library: Path) -> None:
    with pytest.raises(DataError, match="use another data source"):
        StdlibSource()
