"""Which split pattern and special tokens belong to a file of tiktoken ranks."""

import base64
import functools
import pickle
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import data_tokenizers as cases
from titan_data import DataError, TiktokenEncoding, load_tokenizer
from titan_data.tokenizers import tiktoken_encodings
from titan_data.tokenizers.tiktoken import TiktokenTokenizer, parse_ranks
from titan_data.tokenizers.tiktoken_encodings import ENCODINGS, find_encoding

OPENAI = {"gpt2": "r50k_base", "cl100k_base": "cl100k_base", "o200k_base": "o200k_base"}
RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def many_ranks(count: int) -> bytes:
    words = [bytes([i]) for i in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    return b"".join(base64.b64encode(word) + b" %d\n" % i for i, word in enumerate(words[:count]))


@pytest.mark.parametrize("name", OPENAI)
def test_encodings_and_files_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public")
    hashes = []
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda url, expected_hash: hashes.append(expected_hash) or {})
    theirs = getattr(public, OPENAI[name])()
    ours = ENCODINGS[name](0)
    assert (ours.pattern, ours.special_tokens) == (theirs["pat_str"], theirs["special_tokens"])
    assert ours.eos == "<|endoftext|>"
    assert [tiktoken_encodings._FILES[found] for found in hashes] == [name]


@functools.cache
def both(name: str) -> tuple[TiktokenTokenizer, tiktoken.Encoding]:
    """Our tokenizer with an encoding, and tiktoken's own."""
    data = cases.trained("bpe")
    ranks = parse_ranks(data, "ranks")
    encoding = ENCODINGS[name](len(ranks))
    theirs = tiktoken.Encoding("x", pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens={})
    return TiktokenTokenizer(data, encoding=encoding), theirs


@pytest.mark.parametrize("name", ENCODINGS)
@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60) | st.text("ab1 \n'é\u0301sIL<|>_", max_size=60))
def test_ids_are_those_of_tiktoken_with_the_encoding(name: str, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    ours, theirs = both(name)
    expected = theirs.encode_ordinary(unicodedata.normalize("NFC", text) if name == "qwen" else text)
    assert ours.encode(text) == expected
    assert [list(map(int, ids)) for ids in ours.encode_batch([text])] == [expected]


def test_each_encoding_is_another_tokenizer() -> None:
    data = cases.trained("bpe")
    made = {name: TiktokenTokenizer(data, encoding=make(744)) for name, make in ENCODINGS.items()}
    assert len({tokenizer.fingerprint for tokenizer in made.values()}) == len(made)
    assert made["llama3"].fingerprint == TiktokenTokenizer(data).fingerprint
    assert (made["gpt2"].bos_id, made["gpt2"].eos_id, made["gpt2"].vocab_size) == (None, 50256, 50257)
    assert (made["qwen"].eos_id, made["qwen"].vocab_size) == (151643, 151851)
    copy = pickle.loads(pickle.dumps(made["qwen"]))
    assert (copy.fingerprint, copy.encode("e\u0301 12")) == (made["qwen"].fingerprint, made["qwen"].encode("é 12"))


def test_unknown_files_are_not_taken_for_llama_3s(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(many_ranks(60_000))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "own.tiktoken").write_bytes(RANKS)
    for path in (tmp_path, tmp_path / "x" / "own.tiktoken"):
        with pytest.raises(DataError, match=r"not one of the known files .*\(gpt2, cl100k_base.*TiktokenEncoding"):
            load_tokenizer(path)
        assert load_tokenizer(path, encoding="o200k_base").eos_id == 199999
    with pytest.raises(DataError, match="id 50256 of one of them: the file is of another encoding"):
        load_tokenizer(tmp_path, encoding="gpt2")
    with pytest.raises(DataError, match=r"encoding must be one of gpt2, .* not 'p50k_base'"):
        load_tokenizer(tmp_path, encoding="p50k_base")
    own = TiktokenEncoding(r"\w+|\W", {"<end>": 256}, eos="<end>")
    tokenizer = TiktokenTokenizer(RANKS, encoding=own)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 256, 257)
    assert tokenizer.decode(tokenizer.encode("a<end> b")) == "a<end> b"
    assert 256 not in tokenizer.encode("<end>")


def test_an_encoding_of_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(cases.trained("sentencepiece"))
    with pytest.raises(DataError, match="is not a file of tiktoken ranks"):
        load_tokenizer(tmp_path, encoding="gpt2")


def test_published_files_are_recognized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By their contents alone, whatever they are called."""
    import hashlib

    digest = hashlib.sha256(RANKS).hexdigest()
    monkeypatch.setattr(tiktoken_encodings, "_FILES", {digest: "cl100k_base"})
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    assert find_encoding(RANKS) == "cl100k_base"
    assert load_tokenizer(tmp_path).eos_id == 100257
    assert find_encoding(RANKS + b"YWE= 256\n") is None
