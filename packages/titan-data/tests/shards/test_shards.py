"""Token shards: what was written comes back, and whatever is wrong with a folder is found and named."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_flat import flat_loader
from titan_data import Tokenizer
from titan_data.batching.documents import encode_document
from titan_data.errors import DataError
from titan_data.fingerprint import Fingerprint, list_differences
from titan_data.shards import dataset
from titan_data.shards import folder as folders
from titan_data.shards.dataset import TokenShards
from titan_data.shards.format import HEADER_SIZE, MANIFEST, OFFSETS, Header, Job, shard_name
from titan_data.shards.prepare import prepare
from titan_data.shards.statistics import count_lengths
from titan_data.shards.verify import verify_shards
from titan_data.shards.writer import ShardWriter, write_manifest
from titan_data.sources.base import ListSource, TokenSource
from titan_data.tokenizers.base import ByteTokenizer

TEXTS = [f"document {i} " * (i % 7) for i in range(40)]  # some are empty


class CharacterTokenizer(ByteTokenizer):
    """One token per character: needs 32 bits. No bos."""

    vocab_size = 0x110000 + 1
    bos_id = None
    eos_id = 0x110000
    fingerprint = "characters"

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    prepare(ListSource(TEXTS), ByteTokenizer(), folder, workers=0, shard_tokens=500)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to corrupt."""
    return shutil.copytree(original, tmp_path / "corpus")


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=30),
    shard_tokens=st.integers(1, 200),
    tokenizer=st.sampled_from([ByteTokenizer(), CharacterTokenizer()]),
)
def test_documents_come_back(
    texts: list[str], shard_tokens: int, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        check_documents(texts, shard_tokens, tokenizer, folder)


def check_documents(texts: list[str], shard_tokens: int, tokenizer: Tokenizer, folder: Path) -> None:
    manifest = prepare(ListSource(texts), tokenizer, folder, workers=0, shard_tokens=shard_tokens)
    expected = [encode_document(tokenizer, text) for text in texts]
    shards = TokenShards(folder)
    assert isinstance(shards, TokenSource)
    assert len(shards) == len(texts)
    assert shards.tokens == manifest.tokens == sum(map(len, expected))
    order = np.random.default_rng(0).permutation(len(texts))
    assert shards.lengths(order).tolist() == [len(expected[i]) for i in order]
    for i in order:
        document = shards[int(i)]
        assert type(document) is np.ndarray
        assert document.dtype == ("u2" if tokenizer.vocab_size <= 65536 else "u4")
        assert document.tolist() == expected[i].tolist()
    # Every shard but those of one large document keeps to the limit, and none could have held the next one's first.
    for shard, after in zip(manifest.shards, [*manifest.shards[1:], None], strict=True):
        assert shard.documents > 0
        if shard.tokens > shard_tokens:
            first = sum(entry.documents for entry in manifest.shards[: manifest.shards.index(shard)])
            assert sum(len(tokens) > 0 for tokens in expected[first : first + shard.documents]) == 1
        elif after is not None:
            first = sum(entry.documents for entry in manifest.shards[: manifest.shards.index(after)])
            assert shard.tokens + len(expected[first]) > shard_tokens
    assert verify_shards(folder) == []


def test_what_a_folder_says_of_itself(original: Path) -> None:
    shards = TokenShards(original, name="mine")
    assert shards.name == "mine"
    assert TokenShards(str(original)).name == "corpus"
    assert shards.tokenizer_fingerprint == ByteTokenizer.fingerprint
    assert (shards.vocab_size, shards.bos_id, shards.eos_id, shards.pad_id) == (258, 256, 257, None)
    copy = pickle.loads(pickle.dumps(shards))
    assert (copy.name, copy[1].tolist()) == ("mine", shards[1].tolist())
    for index in (-1, len(TEXTS)):
        with pytest.raises(IndexError):
            shards[index]


def test_arrays_are_read_only(original: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        TokenShards(original)[1][0] = 0


def test_fingerprint_tells_which_shard_differs(original: Path, tmp_path: Path) -> None:
    assert TokenShards(original).fingerprint() == TokenShards(shutil.copytree(original, tmp_path / "b")).fingerprint()
    texts = [*TEXTS[:-1], TEXTS[-1].upper()]
    prepare(ListSource(texts), ByteTokenizer(), tmp_path / "c", workers=0, shard_tokens=500)
    differences = list_differences(TokenShards(original).fingerprint(), TokenShards(tmp_path / "c").fingerprint())
    last = len(list(original.glob("shard-*"))) - 1
    assert differences == [f"edited: {shard_name(last)}"]


def test_opening_touches_no_shard_and_few_are_kept_open(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def map_array(path: Path, *arguments: Any) -> Any:
        opened.append(path.name)
        return whole(path, *arguments)

    whole = folders.map_array
    monkeypatch.setattr(folders, "map_array", map_array)
    monkeypatch.setattr(dataset, "_OPEN_SHARDS", 2)
    shards = TokenShards(original)
    shards.lengths(np.arange(len(shards)))
    assert opened == [OFFSETS]
    assert [shards[i].tolist() for i in range(40)] == [encode_document(ByteTokenizer(), t).tolist() for t in TEXTS]
    assert [shards[i].tolist() for i in range(40)] == [encode_document(ByteTokenizer(), t).tolist() for t in TEXTS]
    assert len(opened) > 2 * 4
    assert len(shards._folders[0]._open) == 2


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(original: Path, data: st.DataObject) -> None:
    files = sorted(original.iterdir())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    borders = [0, 16, 500, HEADER_SIZE - 32, HEADER_SIZE, HEADER_SIZE + 400]  # a shard's parts are hit equally often
    borders = [border for border in borders if border < len(content)]
    part = data.draw(st.integers(0, len(borders) - 1))
    place = data.draw(st.integers(borders[part], [*borders, len(content)][part + 1] - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        damages = verify_shards(original, workers=1)
    finally:
        file.write_bytes(whole)
    assert [damage.file for damage in damages] == [file.name]


def test_all_corrupt_files_are_named(folder: Path) -> None:
    for name in (shard_name(0), shard_name(2), OFFSETS):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    (folder / shard_name(1)).unlink()
    path = folder / shard_name(3)
    path.write_bytes(path.read_bytes()[:-100])
    progress = []
    damages = verify_shards(folder, report=lambda done, total: progress.append((done, total)))
    assert [damage.file for damage in damages] == [*map(shard_name, range(4)), OFFSETS]
    assert "No such file" in damages[1].what
    assert "bytes instead of" in damages[3].what
    assert progress[-1][0] == progress[-1][1]


def test_ids_beyond_the_vocabulary_are_found(tmp_path: Path) -> None:
    job = Job(Fingerprint.of("test", []), "test", 10, None, None, None, 100)
    writer = ShardWriter(tmp_path, 0, 0, job)
    writer.append(np.array([1, 9, 10], dtype=np.uint16), np.array([3]))
    write_manifest(tmp_path, job, [writer.publish((0, 1)).entry(0)])
    assert [damage.what for damage in verify_shards(tmp_path)] == ["contains id 10, but the vocabulary has 10 ids"]


def test_missing_and_cut_shards_are_all_named_on_opening(folder: Path) -> None:
    (folder / shard_name(0)).unlink()
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:-8])
    (folder / OFFSETS).write_bytes(b"")
    with pytest.raises(DataError) as error:
        TokenShards(folder)
    for what in (f"{shard_name(0)} is missing", f"{shard_name(1)} has ", f"{OFFSETS} has 0 bytes instead of 328"):
        assert what in str(error.value)


def change_header(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    data[HEADER_SIZE - 32 : HEADER_SIZE] = hashlib.sha256(data[: HEADER_SIZE - 32]).digest()
    path.write_bytes(data)


def test_corrupt_headers_are_refused_when_the_shard_is_read(folder: Path) -> None:
    path = folder / shard_name(1)
    whole = path.read_bytes()
    first = sum(entry["documents"] for entry in json.loads((folder / MANIFEST).read_text())["shards"][:1])
    shards = TokenShards(folder)
    shards[0]
    for place in (0, 7, 20, 4000):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=f"{path.name} is not a token shard|the header of .*{path.name} is corrupt"):
            shards[first]
    path.write_bytes(whole)
    change_header(path, lambda data: data.__setitem__(8, 2))
    with pytest.raises(DataError, match="has version 2, but this titan-data reads version 1: upgrade"):
        shards[first]
    # A whole shard of the same size, of another corpus.
    upper = [text.upper() for text in TEXTS]
    prepare(ListSource(upper), ByteTokenizer(), folder.parent / "upper", workers=0, shard_tokens=500)
    shutil.copy(folder.parent / "upper" / path.name, path)
    with pytest.raises(DataError, match="it comes from another folder"):
        shards[first]
    path.write_bytes(whole)
    assert shards[first].tolist() == encode_document(ByteTokenizer(), TEXTS[first]).tolist()


def test_corrupt_offsets_never_reach_into_another_shard(folder: Path) -> None:
    offsets = np.fromfile(folder / OFFSETS, dtype="<i8")
    offsets[2:] += 10_000
    offsets.tofile(folder / OFFSETS)
    with pytest.raises(DataError, match=f"{OFFSETS} is corrupt: document 1"):
        TokenShards(folder)[1]


def test_corrupt_manifests(folder: Path, tmp_path: Path) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    for text, what in [
        (path.read_text()[:-10], "is corrupt, or not a manifest"),
        ("[]", "is corrupt, or not a manifest"),
        (json.dumps({**manifest, "tokens": 1}), "its checksum does not match"),
        (json.dumps({**manifest, "version": 2}), "has version 2, but"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=what):
            TokenShards(folder)
    path.unlink()
    with pytest.raises(DataError, match="contains no token shards"):
        TokenShards(folder)
    with pytest.raises(DataError, match="contains no token shards"):
        TokenShards(tmp_path / "nowhere")
    with pytest.raises(DataError, match="contains no token shards"):
        verify_shards(folder)


def test_headers_keep_all_they_are_given() -> None:
    header = Header(70_000, "x" * 3000, 1 << 40, 1 << 30, 1 << 50, (3, 1 << 40), "0" * 64)
    assert Header.unpack(header.pack(), "x") == header
    with pytest.raises(DataError, match="tokenizer fingerprint of 5000 characters does not fit"):
        Header(70_000, "x" * 5000, 0, 0, 0, (0, 0), "0" * 64).pack()


def test_statistics(original: Path) -> None:
    found = count_lengths(TokenShards(original))
    lengths = [len(encode_document(ByteTokenizer(), text)) for text in TEXTS]
    assert (found.documents, found.tokens, found.empty) == (40, sum(lengths), lengths.count(0))
    assert (found.shortest, found.longest) == (min(n for n in lengths if n), max(lengths))
    assert list(found.counts) == [
        sum(2**k <= n < 2 ** (k + 1) for n in lengths) for k in range(max(lengths).bit_length())
    ]


def test_statistics_of_many_documents_are_counted_in_parts(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = count_lengths(TokenShards(original))
    monkeypatch.setattr("titan_data.shards.statistics._CHUNK", 7)
    assert count_lengths(TokenShards(original)) == whole


def test_the_reader_of_the_documentation_reads_them(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[4] / "docs" / "token-shards.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(original.parent)
    scope = {}
    exec(code, scope)
    assert [document.tolist() for document in scope["documents"]] == [
        encode_document(ByteTokenizer(), text).tolist() for text in TEXTS
    ]


def test_the_documentation_lists_what_there_is(original: Path) -> None:
    page = (Path(__file__).parents[4] / "docs" / "token-shards.md").read_text(encoding="utf-8")
    manifest = json.loads((original / MANIFEST).read_text())
    data = (original / shard_name(0)).read_bytes()
    header = json.loads(data[16:HEADER_SIZE].partition(b"\0")[0])
    names = {*manifest, *manifest["shards"][0], *manifest["job"], *header, OFFSETS, MANIFEST} - {"source"}
    assert [name for name in names if f"`{name}`" not in page] == []


def test_a_loader_gives_the_batches_of_the_text(original: Path) -> None:
    def batches(source: Any) -> list[Any]:
        loader = flat_loader(source, ByteTokenizer(), seq_len=64, global_batch_size=2, seed=3, prefetch=0)
        return [next(loader)["tokens"].tolist() for _ in range(60)]

    assert batches(TokenShards(original, name="list")) == batches(ListSource(TEXTS))
