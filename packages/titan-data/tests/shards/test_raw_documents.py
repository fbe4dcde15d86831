"""RawTokens: where documents begin and end in files of other projects, and files that are not ids."""

import gzip
import pickle
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_data import DataError, RawTokens

MARK = 50256
DOCUMENTS = [[MARK, 1, 2, 3], [MARK, 4, 5], [MARK, 6]]
BEGINS = [*chain(*DOCUMENTS)]


def llm_c(path: Path, tokens: list[int], version: int = 1) -> Path:
    """As dev/data/data_common.py of llm.c, and modded-nanogpt, write it."""
    header = np.zeros(256, np.int32)
    header[:3] = (20240520, version, len(tokens))
    path.write_bytes(header.tobytes() + np.array(tokens, np.uint16).tobytes())
    return path


def documents(source: RawTokens) -> list[list[int]]:
    lengths = source.lengths(np.arange(len(source)))
    found = [source[i].tolist() for i in range(len(source))]
    assert lengths.tolist() == [len(document) for document in found]
    return found


@pytest.mark.parametrize("header", [True, False])
def test_documents_that_begin_with_a_marker(tmp_path: Path, header: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "fineweb_train_000001.bin"
    if header:
        llm_c(path, BEGINS)
    else:
        np.array(BEGINS, np.uint16).tofile(path)
    source = RawTokens(path, dtype="uint16", bos_id=MARK)
    assert documents(source) == documents(pickle.loads(pickle.dumps(source))) == DOCUMENTS
    said = rf"begins with id {MARK} and does not end with it.*pass bos_id={MARK}"
    if header:
        with pytest.raises(DataError, match=said):
            RawTokens(path, dtype="uint16", eos_id=MARK)
    else:
        RawTokens(path, dtype="uint16", eos_id=MARK)
        assert re.search(said, caplog.text)
    assert documents(RawTokens(path, dtype="uint16")) == [BEGINS]
    assert source.fingerprint() != RawTokens(path, dtype="uint16").fingerprint()


def test_a_file_that_begins_within_a_document(tmp_path: Path) -> None:
    """llm.c cuts files by size."""
    paths = [llm_c(tmp_path / "1.bin", BEGINS), llm_c(tmp_path / "2.bin", [7, 8, *BEGINS])]
    assert documents(RawTokens(paths, dtype="uint16", bos_id=MARK)) == [*DOCUMENTS, [7, 8], *DOCUMENTS]


@settings(deadline=None, max_examples=50)
@given(parts=st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=6), both=st.booleans())
def test_markers_before_and_after(tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], both: bool) -> None:
    written = [[0, *part, 1] if both else [0, *part] for part in parts]
    path = tmp_path_factory.mktemp("raw") / "a.bin"
    np.array([*chain(*written)], np.uint16).tofile(path)
    assert documents(RawTokens(path, dtype="uint16", bos_id=0, eos_id=1)) == written


def test_an_unknown_version_of_the_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"llm\.c's header of version 3"):
        RawTokens(llm_c(tmp_path / "a.bin", BEGINS * 40, version=3), dtype="uint16", bos_id=MARK)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_npy_files(tmp_path: Path, version: tuple[int, int]) -> None:
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.array([3, 4, 0, 5, 0], "<u2"), version=version)
    assert documents(RawTokens(path, dtype="uint16", eos_id=0)) == [[3, 4, 0], [5, 0]]
    with pytest.raises(DataError, match=r"is a \.npy file of uint16, not of uint32 ids"):
        RawTokens(path, dtype="uint32", eos_id=0)
    np.save(path, np.zeros((3, 4), np.uint16))
    with pytest.raises(DataError, match=r"an array \[3, 4\], not of one line of ids"):
        RawTokens(path, dtype="uint16")
    np.save(path, np.arange(90, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated"):
        RawTokens(path, dtype="uint16")
    path.write_bytes(b"\x93NUMPY\x01\x00garbage of some length")
    with pytest.raises(DataError, match=r"(corrupt header|truncated)"):
        RawTokens(path, dtype="uint16")


def written(path: Path, kind: str) -> Any:
    if kind == "a zip archive":
        np.savez(path, a=np.zeros(9, np.uint16))
        path.with_name(path.name + ".npz").rename(path)
    else:
        data = {
            "compressed with gzip": gzip.compress(bytes(100)),
            "compressed with zstandard": b"\x28\xb5\x2f\xfd" + bytes(100),
            "a Parquet file": b"PAR1" + bytes(100),
            "the index of a Megatron-LM dataset": b"MMIDIDX\x00\x00" + bytes(101),
            "a token shard of titan-data": b"TITANTOK" + bytes(100),
        }[kind]
        path.write_bytes(data[: len(data) // 4 * 4])


@pytest.mark.parametrize(
    "kind",
    [
        "a zip archive",
        "compressed with gzip",
        "compressed with zstandard",
        "a Parquet file",
        "the index of a Megatron-LM dataset",
        "a token shard of titan-data",
    ],
)
def test_other_formats_are_not_read_as_ids(tmp_path: Path, kind: str) -> None:
    written(tmp_path / "a.bin", kind)
    with pytest.raises(DataError, match=f"a.bin is {kind}.*not a file of raw ids"):
        RawTokens(tmp_path / "a.bin", dtype="uint16", eos_id=0)
