"""A run's checkpoints as folders that transformers reads."""

from pathlib import Path

import pytest
import torch

from titan_ckpt import open_checkpoint
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


def test_a_model_that_transformers_lacks_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path, model__norm="layernorm")) == ExitCode.BAD_CONFIG
    assert "checkpoint.huggingface" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
