"""The training loop. It is the same for every layout; what depends on the layout is in `run.model`.

`titan_train.run` calls `train` with the parts that `titan_train.assembly` built. One step: take a batch, count the
scored tokens of all ranks, forward and backward of each microbatch, clip, update. Metrics are read from the device only
in steps that are reported or saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_model import EXPERT_METRICS, Router, balance_experts, set_num_target_tokens
from titan_parallel import Microbatch
from titan_train.assembly import Run
from titan_train.distributed import sum_over_ranks
from titan_train.errors import TrainingError
from titan_train.interfaces import Batch
from titan_train.metrics import Meter, StepRecord
from titan_train.schedule import lr_factor
from titan_train.signals import StopSignal
from titan_train.source_loss import SourceLosses


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        stopped: Whether a signal ended it before the last step.
        seconds: Time spent in it.
        tokens: Tokens trained in it, over all ranks.
    """

    stopped: bool
    seconds: float
    tokens: int


@dataclass(frozen=True)
class StepResult:
    """What one step gives; tensors are on the device and nobody has waited for them.

    Attributes:
        loss: This rank's part of the loss, in nats per scored token of the global batch.
        grad_norm: Global norm of the gradients before clipping.
        lr: Learning rate.
        seq_len: Tokens per sequence; phases may change it.
        tokens: Tokens of the global batch.
        experts: Metrics of the experts' load, by tag.
    """

    loss: Tensor
    grad_norm: Tensor
    lr: float
    seq_len: int
    tokens: int
    experts: dict[str, Tensor]


@dataclass
class _Pending:
    """What the steps since the last report left on the device.

    Attributes:
        by_source: The loss of each source.
        healthy: Whether all losses and gradients so far were finite.
        losses: The loss of each step.
    """

    by_source: SourceLosses
    healthy: Tensor
    losses: list[Tensor] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        self.healthy &= torch.isfinite(result.grad_norm) & torch.isfinite(result.loss)
        self.losses.append(result.loss)


def train(run: Run, meter: Meter, stop: StopSignal) -> Outcome:
    """Train from `run.progress` to the last step, or to the end of the step in which a signal arrives.

    Args:
        run: The parts; they are changed by training.
        meter: Takes the metrics.
        stop: Asked before each step.

    Returns:
        How the loop ended. The state at the end has been saved.

    Raises:
        TrainingError: If the loss or a gradient is not finite (nothing is saved then), or if the data is exhausted
            before the last step.
    """
    config, progress = run.config, run.progress
    device = run.process.device
    pending = _Pending(
        SourceLosses([*run.loader.accounting()], device), torch.ones((), dtype=torch.bool, device=device)
    )
    started, first_tokens, saved_step = time.perf_counter(), progress.tokens, progress.step
    stopped = False
    meter.start(progress.step)

    while progress.step < config.training.steps:
        # All ranks stop at the same step, whichever of them received the signal.
        stopped = sum_over_ranks(int(stop.received is not None)) > 0
        if stopped or (batch := next(run.loader, None)) is None:
            break
        result = _train_step(run, batch, pending.by_source)
        pending.add(result)
        meter.count(result.tokens, result.seq_len)
        save = _is_due(progress.step, config.checkpoint.interval)
        if save or _is_reported(run):
            _report(run, meter, pending, result)
        if save:
            _save(run, meter)
            saved_step = progress.step
    if progress.step != saved_step or stopped:
        _check_finite(run, pending.healthy)
        _save(run, meter)
    run.checkpointer.wait()
    if progress.step < config.training.steps and not stopped:
        raise TrainingError(
            f"data exhausted after step {progress.step} of {config.training.steps} (checkpoint saved): raise "
            f"max_epochs of the data or set --training.steps {progress.step}"
        )
    return Outcome(stopped, time.perf_counter() - started, progress.tokens - first_tokens)


def _train_step(run: Run, batch: Batch, by_source: SourceLosses) -> StepResult:
    """Train on one global batch, of which `batch` holds this rank's sequences, and advance `run.progress`."""
    config, progress = run.config, run.progress
    step, seq_len = progress.step + 1, batch["tokens"].shape[1]
    scored = _scored_tokens(run, batch)
    for part in run.model.parts:
        set_num_target_tokens(part, scored)
    loss = run.model.forward_backward(_microbatches(run, batch, by_source), by_source.add, scored)
    experts = _balance_experts(run)
    norm = run.model.clip_grad_norm(config.training.max_norm)
    lr = run.optimizer.step(lr_factor(step, config.training.steps, config.schedule))
    tokens = config.training.global_batch_size * seq_len
    progress.step, progress.tokens = step, progress.tokens + tokens
    return StepResult(loss, norm, lr, seq_len, tokens, experts)


def _is_reported(run: Run) -> bool:
    step = run.progress.step
    return step in (1, run.config.training.steps) or _is_due(step, run.config.metrics.log_interval)


def _report(run: Run, meter: Meter, pending: _Pending, result: StepResult) -> None:
    """Bring the numbers since the last report to the host, on all ranks together, and hand them to the meter."""
    _check_finite(run, pending.healthy)
    losses = run.model.sum_parts(torch.stack(pending.losses)).tolist()
    meter.report(
        StepRecord(
            step=run.progress.step,
            losses=losses,
            grad_norm=float(result.grad_norm),
            lr=result.lr,
            tokens=run.progress.tokens,
            sources=_sources(run, pending.by_source),
            more=_numbers(result.experts),
        )
    )
    pending.losses.clear()


def _save(run: Run, meter: Meter) -> None:
    config = run.config.model_dump()
    mesh = run.model.mesh
    metadata = {
        "config": config,
        "tokens_seen": run.progress.tokens,
        "config_digest": _digest(config),
        "data_fingerprint": _data_fingerprint(run.loader.state_dict()),
        "layout": {name: mesh[name].size() for name in mesh.mesh_dim_names or ()},
    }
    metrics = {"loss": fmean(meter.recent)} if meter.recent else {}
    run.checkpointer.save(run.progress.step, run.state(), metadata=metadata, metrics=metrics)


def _data_fingerprint(state: Mapping[str, Any]) -> str:
    """Return one digest for all of a run's data: the fingerprints of its sources and of its tokenizer.

    Order, mixture and packing are settings: the digest of the config covers them.
    """
    sources = {name: source["fingerprint"]["digest"] for name, source in state["sources"].items()}
    return _digest({"sources": sources, "tokenizer": state["settings"]["tokenizer"]})


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _scored_tokens(run: Run, batch: Batch) -> int:
    """Return the scored tokens of the global batch, at least 1. Ranks with the same sequences count them once."""
    return max(1, sum_over_ranks(int((batch["labels"] != -100).sum()) if run.place.is_dp_leader else 0))


def _microbatches(run: Run, batch: Batch, by_source: SourceLosses) -> list[Microbatch]:
    """Copy the batch to the device and split it."""
    device, masked = run.process.device, run.config.data.mask_documents

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tensor.to(device, non_blocking=True), run.microbatch_size)

    moved = {
        "tokens": split(batch["tokens"]),
        "labels": split(batch["labels"]),
        "positions": split(batch["positions"]),
        "document_ids": split(batch["document_ids"]),
        "source_ids": split(by_source.ids(batch["sources"])),
    }
    return [
        Microbatch(
            args=(moved["tokens"][i],),
            kwargs={
                "labels": moved["labels"][i],
                "positions": moved["positions"][i] if masked else None,
                "document_ids": moved["document_ids"][i] if masked else None,
                "source_ids": moved["source_ids"][i] if by_source.count > 1 else None,
                "n_sources": by_source.count,
                "z_loss": run.config.training.z_loss,
            },
            target=None,
        )
        for i in range(len(moved["tokens"]))
    ]


def _sum_over_data(run: Run, values: Tensor) -> None:
    """Sum in place over the ranks that had other tokens."""
    values.copy_(run.model.sum_parts(values, over_stages=False))


def _balance_experts(run: Run) -> dict[str, Tensor]:
    """Update the experts' selection biases; return metrics of the load over all blocks, of all pipeline stages."""
    if run.model_config.moe is None:
        return {}
    parts = torch.nn.ModuleList(run.model.parts)
    metrics = balance_experts(parts, partial(_sum_over_data, run))
    pipeline = run.model.mesh["pp"]
    if pipeline.size() == 1:
        return metrics
    blocks = sum(isinstance(module, Router) for module in parts.modules())
    zero = torch.zeros((), dtype=torch.float64, device=run.process.device)
    highest, *means = (metrics.get(name, zero) for name in EXPERT_METRICS)
    sums = torch.stack([*(mean * blocks for mean in means), zero + blocks])
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=pipeline.get_group())
    dist.all_reduce(sums, group=pipeline.get_group())
    return dict(zip(EXPERT_METRICS, [highest, *(sums[:-1] / sums[-1])], strict=True))


def _sources(run: Run, by_source: SourceLosses) -> dict[str, dict[str, float]]:
    """Return counts by source and, if there are several, each one's loss since the last report."""
    losses = by_source.take(run.model.sum_parts)
    return {
        name: {**counts, **({"loss": losses[name]} if name in losses else {})}
        for name, counts in run.loader.accounting().items()
    }


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Copy scalars to the host, all in one transfer."""
    return dict(zip(scalars, torch.stack([*scalars.values()]).tolist(), strict=True)) if scalars else {}


def _check_finite(run: Run, healthy: Tensor) -> None:
    if not bool(healthy):
        raise TrainingError(
            f"the loss or a gradient was not finite in one of the last steps, up to step {run.progress.step}. Nothing "
            f"since the last checkpoint under {run.config.run.folder}/checkpoints was saved; resume from there with a "
            "lower optimizer.lr, a longer schedule.warmup_steps or training.dtype float32"
        )


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
