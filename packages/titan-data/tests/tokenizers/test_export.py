"""Exported tokenizers are read by transformers, which then gives the same ids."""

import base64
import json
import random
from pathlib import Path

import pytest

import data_tokenizers as cases
from titan_data import ByteTokenizer, export_tokenizer, load_tokenizer
from titan_data.tokenizers import export

TEXTS = ["", "hello", "  two  spaces\n\ttab ", "Grüße, 世界 🙂", bytes(range(128)).decode()]


def test_the_files_of_a_tokenizer_are_those_that_lie_beside_it(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.train_from_iterator(["some text"], tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>"]))
    for given in (tmp_path / "mine.json", tmp_path):
        file = tmp_path / ("mine.json" if given.suffix else "tokenizer.json")
        trained.save(str(file))
        tokenizer = load_tokenizer(given)
        files = export._contents(tokenizer, str(given))
        assert files["tokenizer.json"] == file.read_bytes()
        out = tmp_path / f"out{given.suffix}"
        out.mkdir()
        (out / ".tokenizer.json.1").write_text("left by a start that was killed")
        written = export_tokenizer(tokenizer, out, loaded_from=given)
        assert {path.name: path.read_bytes() for path in written} == files
        (out / ".tokenizer.json.1").unlink()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
        assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "x"}')
    export_tokenizer(load_tokenizer(tmp_path), tmp_path / "out", loaded_from=tmp_path)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "</s>", "chat_template": "x"}


def test_ranks_of_tiktoken_become_a_tokenizer_that_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tiktoken")
    words = [
        *["he", "th", "in", "an", "er", "ing", "and", "the", "ther", "12", "123"],
        " t",
        " a",
        " th",
        " the",
        "\n\n",
        "  ",
    ]
    ranks = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in words)]
    lines = [f"{base64.b64encode(token).decode()} {number}" for number, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    export_tokenizer(tokenizer, tmp_path / "out", loaded_from=tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (273, 274, 277)
    draw = random.Random(0)
    mixed = ["".join(draw.choices([*words, "Ü", "世", "'s", " ", "\t"], k=40)) for _ in TEXTS]
    for text in [*TEXTS, *mixed, "the other thing and 12345 hers", "<|end_of_text|"]:
        assert theirs(text).input_ids == [273, *tokenizer.encode(text)], text
        assert theirs.decode(tokenizer.encode(text)) == text


def test_bytes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for tokenizer in (ByteTokenizer(), ByteTokenizer(bos=False)):
        export_tokenizer(tokenizer, tmp_path, loaded_from="bytes")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert theirs(text).input_ids == [256] * (tokenizer.bos_id is not None) + tokenizer.encode(text)


def test_sentencepiece_models(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(cases.trained("sentencepiece"))
    tokenizer = load_tokenizer(tmp_path)
    export_tokenizer(tokenizer, tmp_path / "out", loaded_from=tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in ("hello", "two  spaces\n\ttab ", TEXTS[3], cases.texts()[0][:2000]):
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)], text
