"""What a source is: its contents, and a name that somebody has chosen; not the folder that it happens to be in."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_corpus import write_jsonl
from data_flat import flat_loader
from titan_data import (
    ByteTokenizer,
    ChangedDataError,
    IterableSource,
    ListSource,
    Loader,
    MixtureSource,
    Packing,
    Phase,
    RawTokens,
    TokenShards,
    load_files,
    prepare,
)

TEXTS = [f"document {i} " * (1 + i % 5) for i in range(120)]


def shards(folder: Path) -> Any:
    return TokenShards(folder / "shards")


def raw(folder: Path) -> Any:
    return RawTokens([folder / "a.bin"], dtype="uint16", eos_id=7)


def files(folder: Path) -> Any:
    return load_files(folder / "*.jsonl")


def stream(folder: Path) -> Any:
    return load_files(folder / "*.jsonl", streaming=True)


KINDS = [shards, raw, files, stream]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "web"
    prepare(ListSource(TEXTS), ByteTokenizer(), folder / "shards", workers=0, shard_tokens=2000)
    np.array([i % 11 for i in range(5000)], np.uint16).tofile(folder / "a.bin")
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", TEXTS[number::3])
    return folder


def copied(corpus: Path, tmp_path: Path, open_source: Callable[[Path], Any]) -> Path:
    """A copy under another name, of what the source is named by."""
    copy = tmp_path / "job-4711"
    shutil.copytree(corpus, copy)
    if open_source is shards:
        (copy / "shards").rename(copy / "scratch")
        (copy / "shards").symlink_to(copy / "scratch")
    return copy


def loader(sources: Any, **options: Any) -> Loader:
    options = {"seq_len": 64, "global_batch_size": 2, "packing": Packing("best_fit", packing_window=8), **options}
    return flat_loader(sources, ByteTokenizer(), prefetch=0, **options)


def tokens(of: Loader, count: int = 5) -> list[Any]:
    return [next(of)["tokens"].tolist() for _ in range(count)]


@pytest.mark.parametrize("open_source", KINDS)
def test_a_copy_in_another_folder_has_the_same_order_and_resumes(
    corpus: Path, tmp_path: Path, open_source: Callable[[Path], Any]
) -> None:
    copy = copied(corpus, tmp_path, open_source)
    if open_source is shards:
        there: Any = TokenShards(copy / "scratch")
        assert there.name == "scratch"
    else:
        there = open_source(copy)
    first, second = loader(open_source(corpus)), loader(there)
    assert tokens(first) == tokens(second)
    state = json.loads(json.dumps(first.state_dict()))
    third = loader(there)
    third.load_state_dict(state)
    assert third.step == 5
    assert third.accounting()[there.name] == first.accounting()[open_source(corpus).name]
    assert tokens(third) == tokens(first) == tokens(second)
    assert tokens(loader(pickle.loads(pickle.dumps(there)))) == tokens(loader(open_source(corpus)))


def test_mixtures_match_each_copy_with_its_own(corpus: Path, tmp_path: Path) -> None:
    """Also where names change places, and with phases that name the sources."""

    def mixture(names: list[str]) -> list[MixtureSource]:
        paths = [corpus / "shards", corpus / "*.jsonl", tmp_path / "code" / "*.jsonl"]
        opened = [TokenShards(paths[0]), load_files(paths[1]), load_files(paths[2])]
        for source, name in zip(opened, names, strict=True):
            source.name = name  # as if they were in folders of these names
        return [MixtureSource(source, weight) for source, weight in zip(opened, (0.5, 0.3, 0.2), strict=True)]

    def phases(names: list[str]) -> list[Phase]:
        return [Phase(3, dict(zip(names, (0.2, 0.3, 0.5), strict=True))), Phase(8, {names[0]: 1.0})]

    for number in range(2):
        write_jsonl(tmp_path / "code" / f"{number}.jsonl", [f"code {i}" * 9 for i in range(40)])
    before, after = ["a", "b", "c"], ["c", "a", "x"]
    unbroken = loader(mixture(before), phases=phases(before))
    assert tokens(loader(mixture(after), phases=phases(after)), 12) == tokens(unbroken, 12)
    for steps in (1, 5, 10):
        first, second = loader(mixture(before), phases=phases(before)), loader(mixture(after), phases=phases(after))
        tokens(first, steps)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert tokens(second) == tokens(first)
        third = loader(mixture(before), phases=phases(before))  # and back
        third.load_state_dict(json.loads(json.dumps(second.state_dict())))
        assert tokens(third) == tokens(second)


def test_a_chosen_name_is_part_of_the_identity(corpus: Path) -> None:
    named = [loader(TokenShards(corpus / "shards", name=name)) for name in ("a", "b")]
    plain = loader(TokenShards(corpus / "shards"))
    assert len({str(tokens(of)) for of in (*named, plain)}) == 3
    with pytest.raises(
        ChangedDataError, match="source 'b' has the documents of the saved source 'a': continue it"
    ) as e:
        named[1].load_state_dict(named[0].state_dict())
    assert e.value.changes == ("mixture",)
    # Without a name of its own it continues the saved one, in its order.
    plain.load_state_dict(named[0].state_dict())
    assert tokens(plain) == tokens(named[0])
    named[0].load_state_dict(plain.state_dict())
    assert tokens(plain) == tokens(named[0])


def test_other_contents_are_another_source(corpus: Path, tmp_path: Path) -> None:
    prepare(ListSource(TEXTS[1:]), ByteTokenizer(), tmp_path / "shards", workers=0, shard_tokens=2000)
    before, after = loader(shards(corpus)), loader(shards(tmp_path))
    tokens(before)
    with pytest.raises(ChangedDataError, match="data of source 'shards': ") as raised:
        after.load_state_dict(before.state_dict())
    assert raised.value.changes == ("data",)
    after.load_state_dict(before.state_dict(), allow_changes={"data"})
    assert after.step == 5
    assert after.accounting()["shards"]["documents"] == before.accounting()["shards"]["documents"]  # it goes on
    tokens(after)


def test_iterables_without_a_fingerprint_of_their_contents_are_not_matched() -> None:
    before, after = (loader(IterableSource(lambda: iter(TEXTS), name)) for name in ("books", "news"))
    tokens(before)
    with pytest.raises(ChangedDataError) as raised:
        after.load_state_dict(before.state_dict())
    assert raised.value.changes == ("mixture",)


def test_one_corpus_twice_in_a_mixture_is_pointed_out(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loader([MixtureSource(TokenShards(corpus / "shards", name=name)) for name in ("a", "b")])
    assert "sources 'a' and 'b' have the same documents" in caplog.text
