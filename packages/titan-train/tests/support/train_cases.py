"""Cases that run on every rank of a group: full runs of a tiny model."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from titan_train import settings
from titan_train.assembly import Run, assemble
from titan_train.check import check
from titan_train.config import Config
from titan_train.device import Peak
from titan_train.distributed import Process
from titan_train.loop import train
from titan_train.metrics import Meter
from titan_train.sampling import sample
from titan_train.signals import StopSignal
from train_recorder import Recorder

TINY = {
    "model.dim": "64",
    "model.n_layers": "2",
    "model.n_heads": "4",
    "model.n_kv_heads": "4",
    "model.ffn_dim": "96",
    "training.seq_len": "32",
    "training.global_batch_size": "8",
    "training.steps": "10",
    "schedule.warmup_steps": "2",
    "checkpoint.interval": "0",
    "metrics.log_interval": "1",
    "metrics.tensorboard": "false",
    "sample.tokens": "0",
}


def tiny(**changes: str) -> Config:
    """Return the debug config at a size that takes milliseconds a step; `section__key="value"` changes it."""
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return settings.load("debug", [*{**TINY, **given}.items()]).config


def run_here(config: Config) -> dict[str, Any]:
    """Assemble, resume and train; return digests of the weights, and what was reported."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    run = assemble(check(config, world_size), Process(rank, world_size, torch.device("cpu")))
    initial = weights_digest(run)
    resumed = run.checkpointer.load(run.state())
    recorder = Recorder()
    meter = Meter(
        [recorder],
        total_steps=config.training.steps,
        flops_per_token=lambda seq_len: 1.0,
        peak=Peak(1.0, "none"),
        world_size=world_size,
        device=torch.device("cpu"),
    )
    train(run, meter, StopSignal())
    run.checkpointer.close()
    parameters = dict(run.model.named_parameters())
    return {
        "initial": initial,
        "final": weights_digest(run),
        "resumed": resumed.step if resumed else None,
        "losses": {m.step: m.loss for m in recorder.seen},
        "norms": {m.step: m.grad_norm for m in recorder.seen},
        "tokens": {m.step: m.tokens for m in recorder.seen},
        "sources": {m.step: m.sources for m in recorder.seen},
        "more": {m.step: m.more for m in recorder.seen},
        "weights": {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in parameters.items()
        },
        "buffers": {name: buffer.tolist() for name, buffer in run.model.state_dict().items() if name not in parameters},
    }


def sampled(config: Config) -> str | None:
    """Return the text that an untrained model continues the configured prompt with."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    run = assemble(check(config, world_size), Process(rank, world_size, torch.device("cpu")))
    text = sample(run)
    run.checkpointer.close()
    return text


def weights_digest(run: Run) -> str:
    """Return one digest of all weights, gathered."""
    digest = hashlib.sha256()
    for name, parameter in run.model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(name.encode() + full.detach().numpy().tobytes())
    return digest.hexdigest()
