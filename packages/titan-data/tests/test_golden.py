"""The data order, written down: SHA-256 of global batches and of token shards of a corpus that anybody can make.

A digest that differs is a breaking change: runs saved by an earlier release would go on with other tokens than they
were promised, and folders half prepared would not become what they were to be. If that is meant, it needs an entry of
its own in the changelog, a new STATE_VERSION (or version of the format), and new digests here.

Nothing here depends on Python's version or on the machine: bytes are tokenized, and numbers are hashed as little-endian
64-bit integers.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from data_flat import flat_loader
from data_loader_cases import ListStream, run_in_parts
from titan_data import ByteTokenizer, ListSource, Loader, MixtureSource, Packing, Phase, TokenShards, prepare

TEXTS = [f"{i}: " + ("", "naïve ", "日本語, ", "word after word ")[i % 4] * (i * 7 % 13) for i in range(48)]
TEXTS[5] = TEXTS[40] = ""
STEPS = 12  # through more than two epochs

ONE_SOURCE = {
    ("random access", "concat"): "d00d1ef9948f5e24f2f4c9009c70bd24882bd24fe914e9d9d9e2540e0e4bb838",
    ("random access", "best_fit"): "f62c3476990130e93e73264420ab119b85e950b54c786f03c494588b7342e343",
    ("random access", "one_per_row"): "d1278a685d5624cf48de00cdf400c482daf1c63cb5640b923754be55d8b615f6",
    ("stream", "concat"): "8dbdc825a1894bc0f9446df6992ea1c96e7793de7c495568908eecb9b58e92ea",
    ("stream", "best_fit"): "4e8560c61f7c40eb629a4568cbb1a863b64437da3a6ab5307ba60466d60182e2",
    ("stream", "one_per_row"): "136dbe79bb49ac4edadc01f604b12ca17e2d92a6d4a65090976312d5ced99e48",
}
MIXTURE = {
    "concat": "d23a6e9e064a6440290b63fa6ae47bd4376abfde333e30c902973b7c098ed278",
    "best_fit": "32c5278acd94c8c1f856397ea8697a046b09fe335cf53c75f0497caad779aa18",
    "one_per_row": "465efec0befa6228214d1434b4723a392601ac22423268b460aa766fc6010ce1",
}
SHARDS = "60f05e576dca00986ec6578a40c305f091895ebe412ec9be3c005329d230e96c"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "shards"
    prepare(ListSource(TEXTS, "corpus"), ByteTokenizer(), folder, workers=0, shard_tokens=1000)
    return folder


def digest_of_run(sources: Any, packing: str, world_size: int = 2, **options: Any) -> str:
    def make_loader(**place: Any) -> Loader:
        return flat_loader(
            sources,
            ByteTokenizer(),
            seq_len=96,
            global_batch_size=8,
            seed=1234,
            packing=Packing(packing, packing_window=16),
            **options,
            **place,
        )

    digests, _ = run_in_parts(make_loader, [(world_size, 0, 0, 8, STEPS)])
    assert len(digests) == STEPS
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def stream() -> ListStream:
    return ListStream([TEXTS[i::5] for i in range(5)], name="corpus")


@pytest.mark.parametrize("packing", ["concat", "best_fit", "one_per_row"])
def test_one_source(packing: str, shards: Path) -> None:
    found = {
        "random access": digest_of_run(ListSource(TEXTS, "corpus"), packing),
        "stream": digest_of_run(stream(), packing),
    }
    assert found == {kind: ONE_SOURCE[kind, packing] for kind in found}
    # Tokenized beforehand or on the way: the same batches.
    assert digest_of_run(TokenShards(shards, name="corpus"), packing) == found["random access"]


@pytest.mark.parametrize("packing", ["concat", "best_fit", "one_per_row"])
def test_a_mixture_that_switches_weights_and_length(packing: str, shards: Path) -> None:
    sources = [
        MixtureSource(TokenShards(shards, name="shards"), 0.5),
        MixtureSource(ListSource(TEXTS[::-1], "rows"), 0.3, max_epochs=2),
        MixtureSource(stream(), 0.2),
    ]
    stages = [Phase(4, {"corpus": 0.6, "shards": 0.4}), Phase(8, seq_len=64)]
    assert digest_of_run(sources, packing, world_size=4, phases=stages) == MIXTURE[packing]


def test_token_shards(shards: Path) -> None:
    digest = hashlib.sha256()
    paths = sorted(shards.iterdir())
    assert [path.name for path in paths[:2]] == ["document-offsets.u64", "index.json"]
    assert len(paths) > 4
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    assert digest.hexdigest() == SHARDS
