"""A run's checkpoints as folders that transformers reads."""

import base64
import json
from pathlib import Path

import pytest
import torch

from titan_ckpt import open_checkpoint
from titan_data import ByteTokenizer, load_tokenizer
from titan_train.cli import main
from titan_train.errors import ExitCode
from titan_train.tokenizer_files import tokenizer_files, write_tokenizer_files

TINY = {
    "model.dim": "32",
    "model.n_layers": "2",
    "model.n_heads": "4",
    "model.n_kv_heads": "2",
    "model.ffn_dim": "64",
    "training.steps": "4",
    "training.seq_len": "16",
    "training.global_batch_size": "2",
    "checkpoint.interval": "2",
    "checkpoint.huggingface": "true",
    "metrics.tensorboard": "false",
    "run.device": "cpu",
}


def flags(folder: Path, **changes: str) -> list[str]:
    settings = TINY | {"run.folder": str(folder)} | {name.replace("__", "."): value for name, value in changes.items()}
    return ["--config", "debug", *(part for name, value in settings.items() for part in (f"--{name}", value))]


@pytest.mark.slow
def test_each_checkpoint_is_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert main(flags(tmp_path)) == ExitCode.DONE
    folders = sorted((tmp_path / "huggingface").iterdir())
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000004"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[-1])
    with open_checkpoint(str(tmp_path / "checkpoints" / "step-00000004")) as checkpoint:
        trained = checkpoint.read("model/layers.1.attn.q_proj.weight")
        lineage = checkpoint.manifest.lineage
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, trained)
    assert lineage["tokens_seen"] == 4 * 2 * 16
    assert lineage["layout"]["tp"] == 1
    assert lineage["parent"]["step"] == 2

    # Text goes in and comes out as in training, and generation ends where documents end.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[-1])
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == [256, *ByteTokenizer().encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (256, 257)
    with torch.no_grad():  # a model that always says eos
        model.model.norm.weight.fill_(0)
    model.lm_head.bias = torch.nn.Parameter((torch.arange(264) == 257).float())
    assert model.generate(torch.tensor([[256, 65]]), max_new_tokens=9, do_sample=False).tolist() == [[256, 65, 257]]


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
        files = tokenizer_files(tokenizer, str(given))
        assert files["tokenizer.json"] == file.read_bytes()
        out = tmp_path / f"out{given.suffix}"
        out.mkdir()
        (out / ".tokenizer.json.1").write_text("left by a start that was killed")
        written = write_tokenizer_files(out, tokenizer, str(given))
        assert {path.name: path.read_bytes() for path in written} == files
        (out / ".tokenizer.json.1").unlink()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
        assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "x"}')
    files = tokenizer_files(load_tokenizer(tmp_path), str(tmp_path))
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "</s>", "chat_template": "x"}


def test_ranks_of_tiktoken_become_a_tokenizer_that_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tiktoken")
    words = [
        "he",
        "th",
        "in",
        "an",
        " t",
        " a",
        "er",
        "ing",
        "and",
        " th",
        "the",
        " the",
        "ther",
        "12",
        "123",
        "\n\n",
        "  ",
    ]
    ranks = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in words)]
    lines = [f"{base64.b64encode(token).decode()} {number}" for number, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    write_tokenizer_files(tmp_path / "out", tokenizer, str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (273, 274, 277)
    random = torch.Generator().manual_seed(0)
    mixed = [
        "".join([*words, "Ü", "世", "'s", " ", "\t"][i] for i in torch.randint(0, 22, (40,), generator=random))
        for _ in TEXTS
    ]
    for text in [*TEXTS, *mixed, "the other thing and 12345 hers", "<|end_of_text|"]:
        assert theirs(text).input_ids == [273, *tokenizer.encode(text)], text
        assert theirs.decode(tokenizer.encode(text)) == text


def test_a_model_that_transformers_lacks_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path, model__norm="layernorm")) == ExitCode.BAD_CONFIG
    assert "checkpoint.huggingface" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
