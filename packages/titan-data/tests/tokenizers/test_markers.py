"""bos, eos, pad and added tokens: no text becomes one, they can be chosen, and documents have an end."""

import io
import itertools
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import data_tokenizers as cases
from titan_data import DataError, Tokenizer, load_tokenizer
from titan_data.batching.documents import encode_document
from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer

tokenizers = pytest.importorskip("tokenizers")

NAMES = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<|user|>", "[CLS]", "<think>", "  ")
LETTERS = [chr(i) for i in range(33, 127)]


def added(name: str, special: bool) -> Any:
    return tokenizers.AddedToken(name, special=special, normalized=False)


def byte_level(model: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def trained_bpe(*specials: str) -> Any:
    tokenizer = byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*specials],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text and <s> more text"] * 9, trainer)
    return tokenizer


def bpe_with_added_tokens() -> Any:
    tokenizer = trained_bpe("<|endoftext|>")
    tokenizer.add_tokens([added(name, special=False) for name in NAMES[1:]])
    return tokenizer


def bpe_with_names_in_its_vocabulary(**options: Any) -> Any:
    """`ignore_merges` finds whole words; merges make others."""
    vocabulary = {letter: i for i, letter in enumerate([*LETTERS, "Ġ", "s>", *NAMES[:-1]])}
    merges = [("s", ">"), ("<", "s>")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, **options))
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def unigram() -> Any:
    vocabulary = [(name, 0.0) for name in NAMES[:-1]] + [(letter, -5.0) for letter in ["\u2581", *LETTERS]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=4))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([*NAMES[:5]])
    tokenizer.add_tokens(["<|user|>", "<think>"])
    return tokenizer


def words(kind: str) -> Any:
    vocabulary = {word: i for i, word in enumerate([*NAMES[:-1], "a", "word", *LETTERS])}
    model = getattr(tokenizers.models, kind)(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<|endoftext|>"])
    return tokenizer


HUGGING_FACE = {
    "added tokens": bpe_with_added_tokens,
    "whole words": lambda: bpe_with_names_in_its_vocabulary(ignore_merges=True),
    "merges": bpe_with_names_in_its_vocabulary,
    "unigram": unigram,
    "word level": lambda: words("WordLevel"),
    "word piece": lambda: words("WordPiece"),
}


@cache
def sentencepiece_model(**options: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text with <s> | [CLS] / user think pad unk end oftext"] * 200),
        model_writer=out,
        vocab_size=150,
        hard_vocab_limit=False,
        byte_fallback=False,
        user_defined_symbols=["</s>", "<|user|>", "<think>", "[CLS]", "  "],
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@cache
def with_markers(kind: str) -> tuple[Tokenizer, frozenset[int]]:
    """A tokenizer, and the ids that no text may become."""
    if kind in HUGGING_FACE:
        made = HUGGING_FACE[kind]()
        config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
        tokenizer: Tokenizer = HuggingFaceTokenizer(made.to_str().encode(), json.dumps(config).encode())
        markers = {i for i, token in made.get_added_tokens_decoder().items() if token.content.strip()}
        markers -= {made.token_to_id("<unk>")} if kind not in ("added tokens", "whole words", "merges") else set()
        return tokenizer, frozenset(markers | {made.token_to_id(name) for name in config.values()})
    if kind.startswith("sentencepiece"):
        tokenizer = SentencePieceTokenizer(
            sentencepiece_model(model_type=kind.split()[1]), config=b'{"bos_token": "<s>", "eos_token": "</s>"}'
        )
        processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(model_type=kind.split()[1]))
        names = ("<s>", "</s>", "<|user|>", "<think>", "[CLS]")
        return tokenizer, frozenset(processor.piece_to_id(name) for name in names)
    if kind == "tiktoken":
        ranks = TiktokenTokenizer(cases.trained("bpe"))
        return ranks, frozenset(ranks.special_tokens.values())
    return load_tokenizer("bytes"), frozenset({256, 257})


KINDS = (*HUGGING_FACE, "sentencepiece bpe", "sentencepiece unigram", "tiktoken", "bytes")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.sampled_from([*NAMES, " ", "\n", "a", "s>", "<", "word"]) | st.text(max_size=5), max_size=8))
def test_no_text_becomes_a_marker(kind: str, parts: list[str]) -> None:
    tokenizer, markers = with_markers(kind)
    assert tokenizer.eos_id in markers
    for text in ("".join(parts), " ".join(parts)):
        assert not markers & {int(i) for i in tokenizer.encode(text)}, text
        assert (
            not markers & {int(i) for i in pickle.loads(pickle.dumps(tokenizer)).encode(text)} if text == "<s>" else 1
        )


@pytest.mark.parametrize("kind", KINDS)
def test_names_alone_and_between_others(kind: str) -> None:
    tokenizer, markers = with_markers(kind)
    for name, before, after in itertools.product(NAMES, ("", " ", "x"), ("", " ", "x", "\n")):
        ids = tokenizer.encode(before + name + after)
        assert not markers & {int(i) for i in ids}, (before, name, after)
        if kind in ("added tokens", "tiktoken", "bytes"):
            assert tokenizer.decode(ids) == before + name + after


def test_text_without_names_has_the_librarys_ids() -> None:
    texts = [
        "some text",
        "  two  spaces",
        "a\nb",
        "more < text > / and \U0010fffe",
        *(text[:500] for text in cases.texts()),
    ]
    for kind, make in HUGGING_FACE.items():
        made, tokenizer = make(), with_markers(kind)[0]
        for text in texts:
            if not any(name in text for name in NAMES[:-1]):
                assert tokenizer.encode(text) == made.encode(text, add_special_tokens=False).ids


def test_added_tokens_are_matched_where_that_is_asked_for(tmp_path: Path) -> None:
    made = bpe_with_added_tokens()
    made.save(str(tmp_path / "tokenizer.json"))
    think = made.token_to_id("<think>")
    plain, matched = (load_tokenizer(tmp_path, match_added_tokens=asked) for asked in (False, True))
    assert think not in plain.encode("<think>")
    assert matched.encode("<think>") == [think]
    assert pickle.loads(pickle.dumps(matched)).encode("<think>") == [think]
    assert plain.fingerprint != matched.fingerprint
    assert matched.eos_id not in matched.encode("<|endoftext|>")
    assert plain.encode("x  y") == made.encode("x  y").ids  # spaces are text
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(model_type="bpe"))
    plain, matched = (load_tokenizer(tmp_path, eos="</s>", match_added_tokens=asked) for asked in (False, True))
    assert len(matched.encode("<think>")) < len(plain.encode("<think>"))
    assert plain.fingerprint != matched.fingerprint


def test_unknown_characters_that_would_be_markers_are_refused() -> None:
    tokenizer = words("WordLevel")
    with pytest.raises(DataError, match="unknown characters would become token"):
        HuggingFaceTokenizer(tokenizer.to_str().encode(), b'{"eos_token": "<unk>"}')
    # As in many Llama folders: padding is not scored, but unknown characters are text.
    padded = HuggingFaceTokenizer(tokenizer.to_str().encode(), b'{"eos_token": "</s>", "pad_token": "<unk>"}')
    assert padded.pad_id is None


def folder(
    path: Path, *, config: dict[str, Any] | None = None, specials: tuple[str, ...] = ("<|endoftext|>", "<s>")
) -> Path:
    path.mkdir(exist_ok=True)
    trained_bpe(*specials).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").unlink(missing_ok=True)
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


END, BEGIN = 0, 1  # "<|endoftext|>" and "<s>"


@pytest.mark.parametrize(
    ("config", "chosen", "expected"),
    [
        ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, {}, (None, END)),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": False}, {}, (None, END)),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True}, {}, (END, END)),
        ({"bos_token": "<s>", "eos_token": "<|endoftext|>"}, {}, (BEGIN, END)),
        ({"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": False}, {}, (None, END)),
        ({"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_eos_token": False}, {}, (BEGIN, END)),
        ({"bos_token": "<s>", "eos_token": "<|endoftext|>"}, {"bos": None}, (None, END)),
        ({"bos_token": "<s>", "eos_token": "<|endoftext|>"}, {"eos": None}, (BEGIN, None)),
        ({"eos_token": "<|endoftext|>"}, {"bos": "<s>"}, (BEGIN, END)),
        ({}, {"eos": "<s>"}, (None, BEGIN)),
        ({"eos_token": "<|endoftext|>", "bos_token": "<s>"}, {"eos": "<s>", "bos": "<|endoftext|>"}, (END, BEGIN)),
        (None, {}, (BEGIN, END)),
    ],
)
def test_bos_and_eos(tmp_path: Path, config: Any, chosen: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    tokenizer = load_tokenizer(folder(tmp_path / "f", config=config), **chosen)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    document = encode_document(tokenizer, "<s>hi<|endoftext|>").tolist()
    inside = document[expected[0] is not None : len(document) - (expected[1] is not None)]
    assert inside == tokenizer.encode("<s>hi<|endoftext|>")
    assert not {BEGIN, END} & set(inside)
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_bos_and_eos_of_other_kinds(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(cases.trained(kind))
    usual = load_tokenizer(tmp_path)
    assert usual.fingerprint == cases.tokenizer(kind).fingerprint
    names = {"bpe": ("<|begin_of_text|>", "<|eot_id|>"), "sentencepiece": ("<s>", "<s>")}[kind]
    ends = load_tokenizer(tmp_path, bos=None)
    assert (ends.bos_id, ends.eos_id) == (None, usual.eos_id)
    other = load_tokenizer(tmp_path, eos=names[1])
    assert other.bos_id == (None if names[0] == names[1] else usual.bos_id)
    assert len({usual.fingerprint, ends.fingerprint, other.fingerprint}) == 3
    assert pickle.loads(pickle.dumps(ends)).bos_id is None
    with pytest.raises(DataError, match=r"eos names '</nope>' as eos, but .*it has: .*<"):
        load_tokenizer(tmp_path, eos="</nope>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_tokenizer(tmp_path).bos_id is None


def test_bytes_can_be_without_bos_or_eos() -> None:
    tokenizer = load_tokenizer("bytes", bos=None)
    assert encode_document(tokenizer, "a").tolist() == [97, 257]
    assert tokenizer.fingerprint != load_tokenizer("bytes").fingerprint
    with pytest.raises(DataError, match="the tokenizer of bytes has its own eos"):
        load_tokenizer("bytes", eos="</s>")


def test_documents_without_an_end_are_refused(tmp_path: Path) -> None:
    unknown = folder(tmp_path / "unknown", specials=("<fin>", "<s>"))
    for path in (unknown, folder(tmp_path / "named", config={"bos_token": "<s>"})):
        with pytest.raises(DataError, match="names no token for the end of documents"):
            load_tokenizer(path)
    assert load_tokenizer(unknown, eos="<fin>").eos_id == 0
    assert load_tokenizer(unknown, eos=None).eos_id is None


def test_folders_with_several_tokenizers(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", config={"eos_token": "<|endoftext|>"})
    (path / "tokenizer.model").write_bytes(cases.trained("sentencepiece"))
    assert isinstance(load_tokenizer(path), HuggingFaceTokenizer)  # as transformers does
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    assert isinstance(load_tokenizer(path), SentencePieceTokenizer)
    (path / "vocab.json").write_text("{}")
    (path / "merges.txt").write_text("")
    with pytest.raises(DataError, match=r"several tokenizers: tokenizer.model, merges.txt, vocab.json"):
        load_tokenizer(path)
    assert isinstance(load_tokenizer(path / "tokenizer.model"), SentencePieceTokenizer)
    (path / "tokenizer.model").unlink()
    with pytest.raises(
        DataError, match=r"merges.txt, vocab.json, but no tokenizer.model and no tokenizer.json.*save_pretrained"
    ):
        load_tokenizer(path)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_beside_a_sentencepiece_model_are_not_overlooked(tmp_path: Path, where: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(cases.trained("sentencepiece"))
    size = cases.VOCAB_SIZE["sentencepiece"]
    tokens = (
        {"<|im_end|>": size}
        if where == "added_tokens.json"
        else {"added_tokens_decoder": {"1": {"content": "<s>"}, str(size): {"content": "<|im_end|>"}}}
    )
    (tmp_path / where).write_text(json.dumps(tokens))
    with pytest.raises(DataError, match=rf"{where} adds 1 tokens to tokenizer.model, such as '<\|im_end\|>'"):
        load_tokenizer(tmp_path)
    (tmp_path / where).write_text("[")
    with pytest.raises(DataError, match="corrupt"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_folders_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    both = folder(tmp_path / "both", config=config)
    (both / "tokenizer.model").write_bytes(cases.trained("sentencepiece"))
    alone = folder(tmp_path / "alone", config=config)
    lines = [line for text in cases.texts() for line in text.split("\n") if line.strip()][:1000]
    assert len(lines) == 1000
    for path in (both, alone):
        reference = transformers.AutoTokenizer.from_pretrained(path)
        assert load_tokenizer(path).encode_batch(lines) == reference(lines, add_special_tokens=False)["input_ids"]
