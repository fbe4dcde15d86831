"""Finding files: every name that a file system allows, folders and files behind links, and nothing left out."""

import os
from pathlib import Path

import pytest

from data_corpus import read_rows, read_shards, write_jsonl
from data_flat import flat_files
from titan_data import DataError, load_huggingface_dataset
from titan_data.files.glob import find_files

NAMES = [
    "train (1).jsonl",
    "a (2).jsonl.gz",
    "web::en.jsonl",
    "file::x.jsonl",
    "a b.jsonl",
    "what?.jsonl",
    "what?.jsonl.gz",
    "[1].jsonl",
    "100%.jsonl",
    "#1.jsonl",
    "a&b=c;d.jsonl",
    "naïve 漢字.jsonl",
    "UPPER.JSONL",
    "a.b.c.jsonl",
    "a\nb.jsonl",
    "'quoted'.jsonl",
    "{x}.jsonl",
    "~x.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compression = "gz" if name.endswith(".gz") else None
    folder = tmp_path / "web::en (1)"
    folder.mkdir()
    path = write_jsonl(folder / name.removesuffix(".gz"), ["one", "two"], compression)
    pattern = folder / f"*{name[-6:]}"
    for wanted in (
        path,
        pattern,
        tmp_path / "**" / f"*{name[-6:]}",
        f"./{folder.name}/{name}",
        f"web::en*/*{name[-6:]}",
    ):
        assert read_shards(flat_files(wanted, streaming=True, shards=1)) == [["one", "two"]]
        if compression is None:
            assert read_rows(flat_files(wanted)) == ["one", "two"]
    monkeypatch.chdir(folder)
    assert read_shards(flat_files(name, streaming=True, shards=1)) == [["one", "two"]] or name[0] == "~"


def names(pattern: Path) -> list[str]:
    return [file.name for file in find_files(pattern)]


def test_folders_behind_links_are_entered(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_jsonl(elsewhere / "deep" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "data" / "a.jsonl", ["a"])
    (tmp_path / "data" / "link").symlink_to(elsewhere)
    (tmp_path / "data" / "b-link.jsonl").symlink_to(elsewhere / "deep" / "b.jsonl")
    (elsewhere / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(".")
    data = tmp_path / "data"
    assert names(data / "**" / "*.jsonl") == ["a.jsonl", "b-link.jsonl", "link/deep/b.jsonl"]
    assert names(data / "**") == names(data / "**" / "*.jsonl")
    assert names(data / "*" / "**" / "b.jsonl") == ["link/deep/b.jsonl", "self/link/deep/b.jsonl"]
    assert names(data / "l*" / "deep" / "*") == ["link/deep/b.jsonl"]
    assert names(data / "*.jsonl") == ["a.jsonl", "b-link.jsonl"]
    assert read_rows(flat_files(data / "**" / "*.jsonl")) == ["a", "b", "b"]
    (tmp_path / "all").symlink_to(data)
    assert names(tmp_path / "all" / "**" / "*.jsonl") == names(data / "**" / "*.jsonl")


def test_a_folder_that_is_also_behind_a_link_is_read_once(tmp_path: Path) -> None:
    for folder in ("2", "1/x"):
        write_jsonl(tmp_path / folder / "a.jsonl", [folder])
    (tmp_path / "0").symlink_to(tmp_path / "2")
    (tmp_path / "1" / "up").symlink_to(tmp_path)
    assert names(tmp_path / "**" / "*.jsonl") == ["1/x/a.jsonl", "2/a.jsonl"]


@pytest.mark.parametrize("pattern", ["*.jsonl", "**/*.jsonl", "b.jsonl", "[ab].jsonl"])
def test_a_link_to_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to .*gone\.jsonl, which does not exist"):
        find_files(tmp_path / pattern)
    assert names(tmp_path / "a*") == ["a.jsonl"]


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "a.jsonl", ["a"])
    (tmp_path / "b").mkdir(mode=0)
    if os.access(tmp_path / "b", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match=r"folder .*b cannot be read: Permission denied"):
        find_files(tmp_path / "**" / "*.jsonl")


def test_hidden_files_and_patterns_within_a_component(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".b.jsonl", ".c/d.jsonl", "e/f.jsonl"):
        write_jsonl(tmp_path / name, [name])
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "e/f.jsonl"]
    assert names(tmp_path / ".c" / "*.jsonl") == ["d.jsonl"]
    assert names(tmp_path / "[!b].jsonl") == ["a.jsonl"]
    with pytest.raises(DataError, match=r"\*\* must be a component of its own"):
        find_files(tmp_path / "a**.jsonl")


def test_equal_names_from_several_folders_stay_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_jsonl(tmp_path / folder / "a.jsonl", [folder])
    write_jsonl(tmp_path / "y" / "a.jsonl (2)", ["own"])
    found = find_files([tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl", tmp_path / "y" / "a.jsonl (2)"])
    assert len({file.name for file in found}) == 3


def test_datasets_of_folders_with_links(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "data" / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", ["b"])
    link = tmp_path / "data" / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="link is a link to a folder, which `datasets` does not enter"):
        load_huggingface_dataset(str(tmp_path / "data"))
    link.unlink()
    link.with_suffix(".jsonl").symlink_to(tmp_path / "gone")
    for data_files in (None, "*.jsonl"):
        with pytest.raises(DataError, match="which does not exist"):
            load_huggingface_dataset(str(tmp_path / "data"), data_files=data_files)
