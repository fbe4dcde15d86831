"""What came in goes out: tokenizer, chat template, defaults of generation and token ids of a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_families import FAMILIES
from titan_model import Decoder, WeightsError, load_huggingface, save_huggingface

SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture
def origin(random_decoder: Callable[..., Decoder], tmp_path: Path) -> Path:
    """A folder as transformers writes it, with all that a chat model has."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path / "origin"
    save_huggingface(random_decoder(FAMILIES["llama"]), folder)
    model = tokenizers.models.BPE(unk_token="<unk>")
    trained = tokenizers.Tokenizer(model)
    trained.train_from_iterator(["a few words"], tokenizers.trainers.BpeTrainer(vocab_size=30, special_tokens=SPECIAL))
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, **ends)
    fast.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    fast.save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=[2, 5], bos_token_id=1, top_k=7, do_sample=True).save_pretrained(folder)
    edit(folder, bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("config.json", "model.safetensors")
    }


def ids(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "config.json").read_text())
    return {name: values.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}


def test_what_came_in_goes_out(origin: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (origin / "README.md").write_text("not part of the model")
    save_huggingface(load_huggingface(origin, dtype=torch.bfloat16), tmp_path / "out")
    expected = {name: content for name, content in contents(origin).items() if name != "README.md"}
    assert len(expected) >= 4
    assert any("additional_chat_templates" in name for name in expected)
    assert contents(tmp_path / "out") == expected
    assert ids(tmp_path / "out") == {"bos": 1, "eos": [2, 5], "pad": 0}

    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (origin, tmp_path / "out"))
    assert after("a few words").input_ids == before("a few words").input_ids
    assert after.chat_template == before.chat_template
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([2, 5], 7)


def test_a_model_of_ones_own_takes_the_tokenizer_of_a_folder(
    origin: Path, random_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    model = random_decoder(FAMILIES["llama"])
    save_huggingface(model, tmp_path / "out", tokenizer=origin)
    assert contents(tmp_path / "out") == contents(origin)
    assert ids(tmp_path / "out") == {"bos": 1, "eos": [2, 5], "pad": 0}
    # A folder with a tokenizer only: it says which tokens these are.
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (origin / name).unlink()
    save_huggingface(model, tmp_path / "again", tokenizer=origin)
    assert ids(tmp_path / "again") == {"bos": 1, "eos": 2, "pad": 0}
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_token_ids_that_are_given_come_first(origin: Path, tmp_path: Path) -> None:
    save_huggingface(load_huggingface(origin), tmp_path / "out", extra_config={"eos_token_id": 9, "temperature": 0.5})
    assert ids(tmp_path / "out") == {"bos": 1, "eos": 9, "pad": 0}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["bos_token_id"], generation["top_k"]) == (9, 1, 7)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"vocab_size": 99}, "vocab_size is 99, but 37 in the model"),
        ({"hidden_size": 64, "rope_theta": 3.0}, "hidden_size is 64, but 32 in the model; rope_theta is 3.0"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3', but 'llama'"),
        ({"torch_dtype": "float16"}, "torch_dtype is 'float16', but 'float32'"),
        ({"dtype": "float16"}, "dtype is 'float16', but 'float32'"),
        ({"architectures": ["Mine"]}, "architectures is"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: an entry changes"),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_theta"),
        ({"is_causal": False}, "is_causal is False"),
        ({"sliding_window": 8}, "sliding_window is 8"),
        ({"a_new_key": 3}, "a_new_key is 3, which is not known"),
    ],
)
def test_further_entries_cannot_override_what_the_model_knows(
    random_decoder: Callable[..., Decoder], tmp_path: Path, extra: dict[str, Any], said: str
) -> None:
    model = random_decoder(FAMILIES["llama"])
    with pytest.raises(ValueError, match="extra_config: ") as caught:
        save_huggingface(model, tmp_path / "out", extra_config=extra)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    save_huggingface(
        model, tmp_path / "out", extra_config={"vocab_size": 37, "dtype": "float32"}
    )  # what it says anyway


def test_a_tokenizer_that_git_lfs_did_not_download_is_not_exported(origin: Path) -> None:
    (origin / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match=r"tokenizer\.json is a Git LFS pointer"):
        load_huggingface(origin)
