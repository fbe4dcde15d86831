"""TokenShards(verify=True): a byte that has changed on the disk is an error before its token is used."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from data_flat import flat_loader
from titan_data import ByteTokenizer, DataError, ListSource, TokenShards, prepare
from titan_data.shards.format import OFFSETS

TEXTS = [f"document {i} " * (1 + i % 5) for i in range(200)]


def read_all(folder: Path) -> list[Any]:
    source = pickle.loads(pickle.dumps(TokenShards(folder, verify=True)))
    return [source[i] for i in range(len(TEXTS))]


def test_every_corruption_is_noticed_by_a_loader(tmp_path: Path, seed: int) -> None:
    prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "a", workers=0, shard_tokens=2000)
    draw = random.Random(seed)
    names = [path.name for path in sorted((tmp_path / "a").iterdir()) if path.suffix == ".tokens"] + [OFFSETS]
    for _ in range(60):
        path = tmp_path / "a" / draw.choice(names)
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(DataError, match=path.name):
            read_all(tmp_path / "a")
        path.write_bytes(whole)
    assert [len(tokens) for tokens in read_all(tmp_path / "a")] == [len(text) + 2 for text in TEXTS]


def test_ids_are_checked_against_the_shards_own_vocabulary(tmp_path: Path) -> None:
    """Without a tokenizer, too."""
    prepare(ListSource(TEXTS), ByteTokenizer(), tmp_path / "a", workers=0)
    (path,) = (tmp_path / "a").glob("*.tokens")
    data = bytearray(path.read_bytes())
    data[4096 + 21] = 200  # the high byte of a token
    path.write_bytes(data)
    loader = flat_loader(TokenShards(tmp_path / "a"), None, seq_len=64, global_batch_size=8, shuffle=False, prefetch=0)
    with pytest.raises(DataError, match="outside the vocabulary of 258"):
        next(loader)
