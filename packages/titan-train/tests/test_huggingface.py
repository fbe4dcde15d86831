"""A run's checkpoints as folders that transformers reads."""

from pathlib import Path

import pytest
import torch

from titan_ckpt import open_checkpoint
from titan_data import ByteTokenizer
from titan_train.cli import main
from titan_train.errors import ExitCode

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


def test_a_model_that_transformers_lacks_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path, model__norm="layernorm")) == ExitCode.BAD_CONFIG
    assert "checkpoint.huggingface" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
