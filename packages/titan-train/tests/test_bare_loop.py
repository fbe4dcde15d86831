"""A run against the shortest loop that one would write by hand: the same losses and norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import titan_data
import titan_model
from ranks import Ranks
from titan_train.check import model_config
from titan_train.config import Config
from titan_train.schedule import lr_factor
from train_cases import run_here, tiny


def by_hand(config: Config, file: str, masked: bool) -> tuple[dict[int, float], dict[int, float]]:
    shape = model_config(config)
    model = titan_model.build(shape, "cpu")
    titan_model.init_parameters(model.named_parameters(), shape, config.run.seed)
    source = titan_data.load_huggingface_dataset("json", data_files=[file])
    sizes = {"seq_len": config.training.seq_len, "global_batch_size": config.training.global_batch_size}
    loader = titan_data.Loader(source, titan_data.ByteTokenizer(), seed=config.run.seed, **sizes)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=config.optimizer.eps)
    losses, norms = {}, {}
    for step in range(1, config.training.steps + 1):
        batch = next(loader)
        documents = {"positions": batch["positions"], "document_ids": batch["document_ids"]} if masked else {}
        logits, labels = model(batch["tokens"], **documents).flatten(0, 1), batch["labels"].flatten()
        z_loss = config.training.z_loss * logits[labels != -100].logsumexp(-1).square().mean()
        loss = F.cross_entropy(logits, labels) + z_loss
        loss.backward()
        norms[step] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm))
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * lr_factor(step, config.training.steps, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = float(loss.detach())
    return losses, norms


def test_same_as_by_hand(ranks1: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "short.jsonl"  # several documents in each sequence, so that their boundaries matter
    texts = [f"{i} and {i + 1} make {2 * i + 1}." for i in range(300)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"data__source": "huggingface", "data__path": "json", "data__files": str(file), "data__packing": "concat"}
    curves = []
    for masked, z_loss in ((False, "0.0"), (True, "0.0"), (False, "0.01")):
        folder = str(tmp_path / f"{masked}-{z_loss}")
        mask = {"data__mask_documents": str(masked).lower()}
        config = tiny(run__folder=folder, training__z_loss=z_loss, **mask, **data)
        losses, norms = by_hand(config, str(file), masked)
        (result,) = ranks1.run(run_here, config)
        assert result["losses"] == pytest.approx(losses, abs=1e-5)
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
        curves.append(losses)
    # Were they alike, the test could not tell whether documents are masked, or a z-loss is added.
    for other in curves[1:]:
        assert max(abs(curves[0][step] - other[step]) for step in other) > 1e-3
