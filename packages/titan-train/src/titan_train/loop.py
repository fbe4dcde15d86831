"""The training loop. It knows steps, not layouts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from titan_model import EXPERT_FIGURES, Router, balance_experts, set_loss_normaliser
from titan_parallel import Microbatch
from titan_train.assembly import Run
from titan_train.errors import TrainingError
from titan_train.metrics import Meter
from titan_train.process import sum_over_ranks
from titan_train.schedule import lr_factor
from titan_train.seams import Batch
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


def train(run: Run, meter: Meter, stop: StopSignal) -> Outcome:
    """Train from where `run.progress` stands to the last step, or to the end of the step in which a signal comes.

    Args:
        run: The parts; changed as they train.
        meter: Where figures go.
        stop: Asked once a step.

    Returns:
        How it ended. The state as of the end has been saved.

    Raises:
        TrainingError: If loss or gradients stop being finite; nothing is saved then. If the data end too early.
    """
    config, progress = run.config, run.progress
    total = config.training.steps
    by_source = SourceLosses([*run.loader.accounting()], run.process.device)
    healthy = torch.ones((), dtype=torch.bool, device=run.process.device)
    losses: list[torch.Tensor] = []  # of the steps since the last report, on the device
    started, first_tokens, saved_step = time.perf_counter(), progress.tokens, progress.step
    stopped = False
    meter.start(progress.step)

    while progress.step < total:
        # All ranks stop at the same step, whichever of them was told to.
        stopped = sum_over_ranks(int(stop.received is not None)) > 0
        if stopped:
            break
        step = progress.step + 1
        if (batch := next(run.loader, None)) is None:
            break  # every source is at the end of its epochs
        scored = _scored_tokens(run, batch)
        for part in run.model.parts:
            set_loss_normaliser(part, scored)
        loss = run.model.forward_backward(_microbatches(run, batch, by_source), by_source.add, scored)
        experts = _balance_experts(run)
        norm = run.model.clip_grad_norm(config.training.max_norm)
        lr = run.optimizer.step(lr_factor(step, total, config.schedule))
        seq_len = batch["tokens"].shape[1]  # of this step: stages may switch it
        tokens = config.training.global_batch_size * seq_len
        progress.step, progress.tokens = step, progress.tokens + tokens
        meter.count(tokens, seq_len)
        healthy &= torch.isfinite(norm) & torch.isfinite(loss)
        losses.append(loss)

        save = _is_due(step, config.checkpoint.interval)
        if save or step == 1 or step == total or _is_due(step, config.metrics.log_interval):
            _refuse_unhealthy(run, healthy)
            curve = run.model.sum_parts(torch.stack(losses))
            meter.report(
                step,
                curve.tolist(),
                float(norm),
                lr,
                progress.tokens,
                _sources(run, by_source),
                _numbers(experts),
            )
            losses.clear()
        if save:
            _save(run, meter)
            saved_step = step
    if progress.step != saved_step or stopped:
        _refuse_unhealthy(run, healthy)
        _save(run, meter)
    run.checkpointer.wait()
    if progress.step < total and not stopped:
        raise TrainingError(
            f"the data came to its end after step {progress.step} of {total}, which is saved: raise max_epochs of "
            f"the data, or be content with --training.steps {progress.step}"
        )
    return Outcome(stopped, time.perf_counter() - started, progress.tokens - first_tokens)


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
    """Return one word for all of a run's data: its sources' fingerprints, which the loader's state holds, and the
    tokenizer's. Order, mixture and packing are settings, of which the digest of the config tells.
    """
    sources = {name: source["fingerprint"]["digest"] for name, source in state["sources"].items()}
    return _digest({"sources": sources, "tokenizer": state["settings"]["tokenizer"]})


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _scored_tokens(run: Run, batch: Batch) -> int:
    """Return the scored tokens of the global batch, at least 1. Ranks that share rows count them once."""
    return max(1, sum_over_ranks(int((batch["labels"] != -100).sum()) if run.place.leads else 0))


def _microbatches(run: Run, batch: Batch, by_source: SourceLosses) -> list[Microbatch]:
    device, masked = run.process.device, run.config.data.mask_documents

    def pieces(whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(whole.to(device, non_blocking=True), run.microbatch_size)

    moved = {
        "tokens": pieces(batch["tokens"]),
        "labels": pieces(batch["labels"]),
        "positions": pieces(batch["positions"]),
        "document_ids": pieces(batch["document_ids"]),
        "source_ids": pieces(by_source.ids(batch["sources"])),
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


def _sum_over_data(run: Run, values: torch.Tensor) -> None:
    """Sum in place over the ranks that had other tokens."""
    values.copy_(run.model.sum_parts(values, over_stages=False))


def _balance_experts(run: Run) -> dict[str, torch.Tensor]:
    """Even out the load of the experts, and return how even it was in all blocks, also those of other stages."""
    if run.model_config.moe is None:
        return {}
    parts = torch.nn.ModuleList(run.model.parts)
    figures = balance_experts(parts, partial(_sum_over_data, run))
    pipeline = run.model.mesh["pp"]
    if pipeline.size() == 1:
        return figures
    blocks = sum(isinstance(module, Router) for module in parts.modules())
    zero = torch.zeros((), dtype=torch.float64, device=run.process.device)
    highest, *means = (figures.get(name, zero) for name in EXPERT_FIGURES)
    sums = torch.stack([*(mean * blocks for mean in means), zero + blocks])
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=pipeline.get_group())
    dist.all_reduce(sums, group=pipeline.get_group())
    return dict(zip(EXPERT_FIGURES, [highest, *(sums[:-1] / sums[-1])], strict=True))


def _sources(run: Run, by_source: SourceLosses) -> dict[str, dict[str, float]]:
    """Return counts by source and, of several, each one's loss since the last report."""
    losses = by_source.take(run.model.sum_parts)
    return {
        name: {**counts, **({"loss": losses[name]} if name in losses else {})}
        for name, counts in run.loader.accounting().items()
    }


def _numbers(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Bring scalars to the host, all at once."""
    return dict(zip(scalars, torch.stack([*scalars.values()]).tolist(), strict=True)) if scalars else {}


def _refuse_unhealthy(run: Run, healthy: torch.Tensor) -> None:
    if not bool(healthy):
        raise TrainingError(
            f"the loss or a gradient was not finite in one of the last steps, up to step {run.progress.step}. Nothing "
            f"since the last checkpoint under {run.config.run.folder}/checkpoints was saved; from there a lower "
            "optimizer.lr, a longer schedule.warmup_steps or training.dtype float32 may help"
        )


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
