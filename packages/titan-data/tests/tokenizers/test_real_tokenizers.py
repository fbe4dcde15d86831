"""tiktoken, SentencePiece and tokenizer.json: round trips, special tokens, huge and odd texts, corrupt files."""

import base64
import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data_tokenizers as cases
from titan_data import Tokenizer
from titan_data.errors import DataError
from titan_data.tokenizers import sentencepiece as sentencepiece_module
from titan_data.tokenizers import tiktoken
from titan_data.tokenizers.base import ByteTokenizer
from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
from titan_data.tokenizers.load import load_tokenizer
from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer, cut_long_text
from titan_data.tokenizers.tiktoken_encodings import SPECIAL_TOKENS, SPLIT_PATTERN
from titan_data.tokenizers.train import train_tokenizer

each_kind = pytest.mark.parametrize("kind", cases.KINDS)

SPECIAL_NAMES = ("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_250|>", "<s>", "</s>", "<unk>", "<0x41>")
# U+2581 is SentencePiece's own sign for a space: it comes back as one.
TEXT = st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",)), max_size=80)


def special_ids(tokenizer: Tokenizer) -> set[int | None]:
    return {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {None}


def as_lists(batch: Any) -> list[list[int]]:
    """The ids of several texts, some of which are arrays."""
    return [[int(i) for i in ids] for ids in batch]


@each_kind
@settings(deadline=None, max_examples=150)
@given(text=TEXT)
@example(text=" \r\n\t  x  \n\n")
@example(text="\0 \x7f\ufffe")
@example(text="naïve 日本語 👩\u200d👩\u200d👧 e\u0301 ﷽")
def test_round_trip(kind: str, text: str) -> None:
    tokenizer = cases.tokenizer(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids == []) == (text == "")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@each_kind
@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.sampled_from(SPECIAL_NAMES) | TEXT, max_size=8))
def test_names_of_special_tokens_are_text(kind: str, parts: list[str]) -> None:
    tokenizer = cases.tokenizer(kind)
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert not special_ids(tokenizer) & set(ids)
    if kind == "bpe":
        assert max(ids, default=0) < tokenizer.bos_id
    assert tokenizer.decode(ids) == text


@each_kind
@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.sampled_from(SPECIAL_NAMES) | TEXT, max_size=6), times=st.sampled_from([1, 3000]))
def test_a_batch_is_its_texts(kind: str, texts: list[str], times: int) -> None:
    tokenizer = cases.tokenizer(kind)
    texts = [text * times for text in texts]  # long ones are done in threads
    assert as_lists(tokenizer.encode_batch(texts)) == [tokenizer.encode(text) for text in texts]


@each_kind
def test_special_ids_and_unknown_ids_give_no_text(kind: str) -> None:
    tokenizer = cases.tokenizer(kind)
    ids = tokenizer.encode("hello")
    around = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.vocab_size, 10**9, -1]
    assert tokenizer.decode(around) == "hello"
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "hello"
    assert len(special_ids(tokenizer)) >= 2
    assert all(0 <= i < tokenizer.vocab_size for i in special_ids(tokenizer))


@each_kind
def test_lone_surrogates_are_replaced(kind: str) -> None:
    tokenizer = cases.tokenizer(kind)
    for text in ("a\ud800b", "\udfff", "\udfff" * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == re.sub("[\ud800-\udfff]", "\ufffd", text)
    assert as_lists(tokenizer.encode_batch(["\ud800", "x"])) == [tokenizer.encode("\ufffd"), tokenizer.encode("x")]


@each_kind
@pytest.mark.parametrize(
    "piece", ["a", "é", "ab \n", *(pytest.param(piece, marks=pytest.mark.slow) for piece in (" ", "\n", "\t ", "1"))]
)
def test_long_runs(kind: str, piece: str) -> None:
    tokenizer = cases.tokenizer(kind)
    text = piece * (1_000_000 // len(piece))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@each_kind
@pytest.mark.parametrize(
    "megabytes", [pytest.param(5, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.nightly)]
)
def test_a_large_document(kind: str, megabytes: int) -> None:
    tokenizer = cases.tokenizer(kind)
    text = "".join(cases.texts())
    text *= megabytes * 1_000_000 // len(text.encode()) + 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


@each_kind
def test_pickles(kind: str) -> None:
    tokenizer = cases.tokenizer(kind)
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = cases.texts()[0][:2000]
    assert copy.encode(text) == tokenizer.encode(text)
    assert (copy.fingerprint, copy.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)


@each_kind
def test_load_tells_kinds_by_content_and_fingerprints_by_it(kind: str, tmp_path: Path) -> None:
    data = cases.trained(kind)
    name = "tokenizer.json" if kind == "huggingface" else "tokenizer.model"
    for path in (tmp_path / "a" / name, tmp_path / "b" / "c" / name):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    by_file, by_folder = load_tokenizer(tmp_path / "a" / name), load_tokenizer(str(tmp_path / "b" / "c"))
    assert type(by_file) is type(by_folder) is type(cases.tokenizer(kind))
    assert by_file.fingerprint == by_folder.fingerprint == cases.tokenizer(kind).fingerprint
    assert by_file.vocab_size == cases.VOCAB_SIZE[kind]
    with pytest.raises(DataError, match=f"did you mean {tmp_path / 'b' / 'c'}"):
        load_tokenizer(tmp_path / "b")


@each_kind
def test_another_tokenizer_has_another_fingerprint(kind: str) -> None:
    data = cases.trained(kind)
    if kind == "bpe":  # exchange the tokens of two ranks
        lines = data.splitlines(keepends=True)
        lines[300], lines[301] = (lines[b].split()[0] + b" %d\n" % a for a, b in ((300, 301), (301, 300)))
        other = TiktokenTokenizer(b"".join(lines))
    elif kind == "sentencepiece":
        other = SentencePieceTokenizer(train_tokenizer(cases.texts(), kind=kind, vocab_size=601))
    else:
        other = HuggingFaceTokenizer(data, json.dumps({"eos_token": "<s>"}).encode())
    assert other.fingerprint != cases.tokenizer(kind).fingerprint


@each_kind
def test_cut_files_are_refused(kind: str, tmp_path: Path) -> None:
    data = cases.trained(kind)
    path = tmp_path / "tokenizer.model"
    lengths = {*range(0, len(data), len(data) // 60), *range(len(data) - 25, len(data))}
    for length in lengths:
        path.write_bytes(data[:length])
        if kind == "bpe" and length > 2000 and b"\n" in data[length - 1 : length + 1]:
            continue  # whole lines, so just fewer ranks: that is another tokenizer
        with pytest.raises(DataError, match=str(path)):
            load_tokenizer(path)


@pytest.mark.slow
@each_kind
def test_training_is_reproducible_in_another_process(kind: str) -> None:
    if kind == "huggingface":
        pytest.skip("not trained by this package")
    if kind == "bpe":
        pytest.importorskip("tokenizers")  # which trains it
    code = f"import sys, hashlib, data_tokenizers as cases\nprint(hashlib.sha256(cases.trained({kind!r})).hexdigest())"
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashlib.sha256(cases.trained(kind)).hexdigest()


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=100) | st.text("abe \n", max_size=100))
def test_tiktoken_gives_the_ids_of_the_trainer(text: str) -> None:
    ranks = cases.VOCAB_SIZE["bpe"] - SPECIAL_TOKENS
    trainer = _trainer(ranks)
    text = text.encode("utf-8", "replace").decode()
    assert cases.tokenizer("bpe").encode(text) == trainer.encode(text).ids


def test_tiktoken_gives_the_ids_of_the_trainer_on_real_text() -> None:
    trainer = _trainer(cases.VOCAB_SIZE["bpe"] - SPECIAL_TOKENS)
    for text in cases.texts():
        assert cases.tokenizer("bpe").encode(text) == trainer.encode(text).ids


def _trainer(ranks: dict[bytes, int], made: dict[Any, Any] = {}) -> Any:  # noqa: B006
    if ranks not in made:
        made[ranks] = cases.train_huggingface(ranks, [])
    return made[ranks]


def test_llama_3s_special_tokens() -> None:
    words = [bytes([i]) for i in range(256)]
    words += [bytes([a, b]) for a in range(256) for b in range(256)]
    words += [bytes([a, b, 0]) for a in range(256) for b in range(256)]
    data = b"".join(base64.b64encode(word) + b" %d\n" % i for i, word in enumerate(words[:128_000]))
    tokenizer = TiktokenTokenizer(data)
    assert tokenizer.vocab_size == 128_256
    assert sorted(tokenizer.special_tokens.values()) == list(range(128_000, 128_256))
    # As in Meta's llama3 repository, llama/tokenizer.py.
    known = {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|reserved_special_token_0|>": 128_002,
        "<|reserved_special_token_3|>": 128_005,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|reserved_special_token_4|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|reserved_special_token_5|>": 128_010,
        "<|reserved_special_token_250|>": 128_255,
    }
    assert {name: tokenizer.special_tokens[name] for name in known} == known
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (128_000, 128_001, 128_004)
    assert max(tokenizer.encode("<|begin_of_text|>hi<|eot_id|>")) < 128_000


def test_the_split_pattern_cuts_as_llama_3s() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("I'LL pay 12345 dollars!!\n\n  ok\t x")]
    assert pieces == ["I", "'LL", " pay", " ", "123", "45", " dollars", "!!\n\n", " ", " ok", "\t", " x"]


@settings(deadline=None, max_examples=300)
@given(text=st.text(" \na\u3000", max_size=120))
def test_long_texts_are_cut_as_the_reference_cuts_them(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "_MAX_CHARACTERS", 40)
        patch.setattr(tiktoken, "_MAX_RUN", 6)
        pieces = cut_long_text(text)
    assert "".join(pieces) == text
    assert pieces == [piece for start in range(0, len(text), 40) for piece in naive_cut(text[start : start + 40], 6)]


def naive_cut(text: str, limit: int) -> list[str]:
    """Cut character by character: a piece ends where a run of one sort would grow beyond the limit."""
    pieces, piece, run, space = [], "", 0, None
    for character in text:
        run = run + 1 if character.isspace() == space else 1
        space = character.isspace()
        if run > limit:
            pieces.append(piece)
            piece, run = "", 1
        piece += character
    return [*pieces, piece]


@settings(deadline=None, max_examples=300)
@given(text=st.text(" \nab1.", max_size=120) | TEXT)
def test_long_texts_are_cut_for_sentencepiece_without_a_trace(text: str) -> None:
    whole = cases.tokenizer("sentencepiece").encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_module, "_CUT_FROM", 7)
        assert cases.tokenizer("sentencepiece").encode(text) == whole
        assert cases.tokenizer("sentencepiece").encode_batch([text, "", text]) == [whole, [], whole]


@pytest.mark.parametrize("change", [{"add_dummy_prefix": False}, {"user_defined_symbols": ["turn\u2581x"]}])
def test_models_for_which_a_cut_would_show_are_not_cut(change: dict[str, Any]) -> None:
    lines = [line for text in cases.texts() for line in text.split("\n")][:2000]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=500, model_type="bpe", minloglevel=2, **change
    )
    tokenizer = SentencePieceTokenizer(out.getvalue())
    text = "return x and return x if a is b"
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_module, "_CUT_FROM", 3)
        assert tokenizer.encode(text) == whole
        assert tokenizer.encode_batch([text]) == [whole]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it is empty"),
        (b"hello world\n", "neither tiktoken ranks"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML or XML page"),
        (b'{"hello": 1}', "is not a Hugging Face tokenizer, or is corrupt"),
        (b"\n\x05hello", "is not a SentencePiece model, or is corrupt"),
        (b"aGk= 0\naGk= 1\n", "line 2 must have a new token and rank 1"),
        (b"aGk= 1\n", "line 1 must have a new token and rank 0"),
        (b"aGk= 0\n", "256 of the 256 single bytes have no token"),
        (b"aGk= 0\n??? 1\n", "line 2 is not a token in base64 and its rank"),
    ],
)
def test_files_that_are_no_tokenizer(data: bytes, what: str, tmp_path: Path) -> None:
    if b"{" in data:
        pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(
        DataError, match=f"tokenizer.model is not a.*{re.escape(what)}|tokenizer.model {re.escape(what)}"
    ):
        load_tokenizer(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    assert load_tokenizer("bytes").fingerprint == ByteTokenizer.fingerprint
    with pytest.raises(DataError, match=r"tokenizer nowhere.model does not exist: .*download-tokenizer"):
        load_tokenizer("nowhere.model")
    with pytest.raises(DataError, match=r"has no tokenizer.model and no tokenizer.json$"):
        load_tokenizer(tmp_path)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'titan-data\[huggingface\]'"):
        HuggingFaceTokenizer(b"{}")
    with pytest.raises(DataError, match=r"pip install 'titan-data\[huggingface\]'"):
        train_tokenizer(["a"], kind="bpe", vocab_size=600)


def test_more_ids_than_the_texts_give() -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=r"enough for 513 ids .*not 5000"):
        train_tokenizer(["ab"], kind="bpe", vocab_size=5000)
    with pytest.raises(DataError, match="at least 512 ids"):
        train_tokenizer(["ab"], kind="bpe", vocab_size=511)
    with pytest.raises(DataError, match=r"cannot train 5000 ids on these texts: Vocabulary size too high"):
        train_tokenizer(["ab"], kind="sentencepiece", vocab_size=5000)
    for kind in ("bpe", "sentencepiece"):
        with pytest.raises(DataError, match="there is no text to train a tokenizer on"):
            train_tokenizer(["", " \n"], kind=kind, vocab_size=600)


def test_truncation_and_padding_of_the_file_do_not_count() -> None:
    model = cases.train_huggingface(600, ["<s>"])
    model.enable_truncation(5)
    model.enable_padding(length=50)
    tokenizer = HuggingFaceTokenizer(model.to_str().encode())
    text = "def f(): return 1\n" * 20
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def test_config_beside_tokenizer_json(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(cases.trained("huggingface"))
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (0, 1)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<s>"}, "pad_token": "</s>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 0, 1)
    config.write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match="'<nope>' as eos_token"):
        load_tokenizer(tmp_path)
    for damaged in ("{", "[]"):
        config.write_text(damaged)
        with pytest.raises(DataError, match=r"tokenizer_config.json next to .*(corrupt|not a JSON object)"):
            load_tokenizer(tmp_path)
