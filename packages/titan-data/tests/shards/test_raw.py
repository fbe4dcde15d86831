"""Other people's token files: bare ids as nanoGPT and llm.c write them, and Megatron-LM's indexed datasets."""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_data.errors import DataError
from titan_data.shards import raw
from titan_data.shards.megatron import MegatronTokens
from titan_data.shards.raw import RawTokens
from titan_data.sources.base import TokenSource

EOS = 7


def write(path: Path, ids: list[int], dtype: str = "uint16") -> Path:
    np.array(ids, dtype=dtype).tofile(path)
    return path


def cut_at_eos(ids: list[int]) -> list[list[int]]:
    documents = [[]]
    for i in ids:
        documents[-1].append(i)
        if i == EOS:
            documents.append([])
    return documents if documents[-1] else documents[:-1]


def read_all(source: Any) -> list[Any]:
    assert isinstance(source, TokenSource)
    documents = [source[i].tolist() for i in range(len(source))]
    order = np.random.default_rng(0).permutation(len(source))
    assert source.lengths(order).tolist() == [len(documents[i]) for i in order]
    return documents


@settings(deadline=None, max_examples=60)
@given(
    files=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), min_size=1, max_size=4),
    dtype=st.sampled_from(["uint16", "uint32"]),
    scan=st.integers(1, 50),
)
def test_documents_end_with_eos_and_files(
    files: list[list[int]], dtype: str, scan: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    paths = [write(folder / f"{i}.bin", ids, dtype) for i, ids in enumerate(files)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "_SCAN", scan)
        source = RawTokens(paths, dtype=dtype, eos_id=EOS, vocab_size=10)
    assert read_all(source) == [document for ids in files for document in cut_at_eos(ids)]
    assert source[0].dtype == dtype
    assert read_all(RawTokens(paths, dtype=dtype, eos_id=None)) == files


def test_names_fingerprints_and_copies(tmp_path: Path) -> None:
    path = write(tmp_path / "train.bin", range(100))
    source = RawTokens(path, dtype="uint16", eos_id=EOS)
    assert (source.name, source.tokenizer_fingerprint) == ("train.bin", None)
    assert RawTokens(path, dtype="uint16", eos_id=EOS, name="mine").name == "mine"
    copy = pickle.loads(pickle.dumps(source))
    assert read_all(copy) == read_all(source)
    assert copy.fingerprint() == source.fingerprint()
    assert RawTokens(path, dtype="uint16", eos_id=8).fingerprint() != source.fingerprint()
    before = source.fingerprint()
    write(path, [*range(50), 8, *range(51, 100)])
    assert RawTokens(path, dtype="uint16", eos_id=EOS).fingerprint() != before
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


def test_an_edit_in_the_middle_of_a_large_file_changes_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "train.bin", np.zeros(100_000))
    before = RawTokens(path, dtype="uint16", eos_id=None).fingerprint()
    ids = np.zeros(100_000)
    ids[53_210] = 1
    write(path, ids)
    assert RawTokens(path, dtype="uint16", eos_id=None).fingerprint() != before


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")], ids=["gpt2", "llama3"]
)
def test_llm_c_headers_are_recognized(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    ids = [EOS, 1, 2, EOS, 3]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    path = tmp_path / "fineweb.bin"
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())
    assert read_all(RawTokens(path, dtype=dtype, bos_id=EOS)) == [[EOS, 1, 2], [EOS, 3]]
    with pytest.raises(DataError, match=f"contains {dtype} according to its header"):
        RawTokens(path, dtype="uint32" if dtype == "uint16" else "uint16", eos_id=EOS)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="should have 5 tokens according to its header"):
        RawTokens(path, dtype=dtype, eos_id=EOS)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with pytest.raises(DataError, match="cannot read"):
        RawTokens(path, dtype="uint16", eos_id=EOS)
    for content in (b"", b"abc"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"has {len(content)} bytes; is it of another dtype, or truncated"):
            RawTokens(path, dtype="uint16", eos_id=EOS)
    write(path, [1, 2, 500, 3])
    with pytest.raises(DataError, match=r"contains id 500, but the vocabulary has 500 ids"):
        RawTokens(path, dtype="uint16", eos_id=EOS, vocab_size=500)
    with pytest.raises(DataError, match="dtype must be"):
        RawTokens(path, dtype="int64", eos_id=EOS)
    with pytest.raises(DataError, match="no files"):
        RawTokens([], dtype="uint16", eos_id=EOS)


def write_megatron(
    prefix: Path, documents: list[list[list[int]]], code: int = 8, order: list[int] | None = None, modes: bool = False
) -> Path:
    """Write a dataset as Megatron-LM does: documents are lists of sequences of ids."""
    dtype = {8: "<u2", 4: "<i4"}[code]
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    starts = np.zeros(len(sequences), dtype="<i8")
    data = b""
    for number in order or range(len(sequences)):
        starts[number] = len(data)
        data += np.array(sequences[number], dtype=dtype).tobytes()
    borders = np.cumsum([0, *map(len, documents)]).astype("<i8")
    prefix.with_suffix(".bin").write_bytes(data)
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(borders))
        + lengths.tobytes()
        + starts.tobytes()
        + borders.tobytes()
        + (b"\0" * len(sequences) if modes else b"")
    )
    return prefix


@settings(deadline=None, max_examples=80)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 60_000), max_size=6), max_size=4), max_size=8),
    code=st.sampled_from([4, 8]),
    data=st.data(),
)
def test_megatron_documents(
    documents: list[list[list[int]]], code: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    count = sum(map(len, documents))
    order = data.draw(st.permutations(range(count))) if data.draw(st.booleans()) else None
    prefix = tmp_path_factory.mktemp("megatron") / "corpus_text_document"
    write_megatron(prefix, documents, code, order, modes=data.draw(st.booleans()))
    expected = [[i for sequence in document for i in sequence] for document in documents]
    for path in (prefix, prefix.with_suffix(".bin"), str(prefix.with_suffix(".idx"))):
        assert read_all(MegatronTokens(path)) == expected


def test_megatron_documents_of_one_sequence_are_views(tmp_path: Path) -> None:
    source = MegatronTokens(write_megatron(tmp_path / "a", [[[1, 2]], [[3]], [[]]]))
    assert (source.name, read_all(source)) == ("a", [[1, 2], [3], []])
    assert not source[0].flags.owndata
    copy = pickle.loads(pickle.dumps(source))
    assert (read_all(copy), copy.fingerprint()) == (read_all(source), source.fingerprint())
    with pytest.raises(IndexError):
        source[3]


def test_bad_megatron_files(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "a", [[[1, 2], [3]], [[4, 5, 6]]])
    idx, whole = prefix.with_suffix(".idx"), prefix.with_suffix(".idx").read_bytes()
    for content, what in [
        (whole[:20], "is not an index of a Megatron-LM dataset, or is truncated"),
        (b"X" + whole[1:], "is not an index of a Megatron-LM dataset, or is truncated"),
        (whole[:-1], "is truncated: it has"),
        (whole[:9] + b"\x02" + whole[10:], "has version 2"),
        (whole[:17] + b"\x07" + whole[18:], "has type 7, which is not an integer type"),
        (whole[:-8] + struct.pack("<q", 2), "its documents do not cover its 3 sequences"),
    ]:
        idx.write_bytes(content)
        with pytest.raises(DataError, match=what):
            MegatronTokens(prefix)
    idx.write_bytes(whole)
    (tmp_path / "a.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"a.bin is truncated: it has 4 bytes instead of 12"):
        MegatronTokens(prefix)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match=r"cannot open .*a.bin"):
        MegatronTokens(prefix)
    with pytest.raises(DataError, match=r"cannot read .*b.idx"):
        MegatronTokens(tmp_path / "b")
