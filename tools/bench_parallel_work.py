"""What the benchmarks of titan-parallel share: the model, its batch, and groups of processes."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import titan_model
from titan_model import DecoderConfig, MoEConfig
from titan_parallel import Degrees, Microbatch, ParallelModel, ParallelOptions, build_mesh, parallelize

SHAPE = DecoderConfig(
    vocab_size=16_384, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, ffn_dim=2048, max_seq_len=1024
)  # 110.1 million parameters
TINY = replace(SHAPE, vocab_size=256, dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=128, max_seq_len=64)
EXPERTS = MoEConfig(n_experts=8, top_k=2, ffn_dim=256)  # with each block of these


@dataclass(frozen=True)
class Settings:
    """What to measure, in a form that goes to other processes."""

    tiny: bool
    rounds: int
    steps: int

    @property
    def shape(self) -> DecoderConfig:
        """Of the model."""
        return TINY if self.tiny else SHAPE


def build(shape: DecoderConfig) -> titan_model.Decoder:
    """Return a decoder with its initial weights."""
    model = titan_model.build(shape, device="cpu")
    titan_model.init_parameters(model.named_parameters(), shape, seed=0)
    return model


def laid_out(shape: DecoderConfig, degrees: Degrees, options: ParallelOptions | None = None) -> ParallelModel:
    """Return a decoder laid out over the processes of the group."""
    return parallelize(build(shape), build_mesh(degrees, "cpu"), titan_model.parallel_plan(shape), options)


def one_row(shape: DecoderConfig) -> tuple[Microbatch, int]:
    """Return a microbatch of one row, and how many labels it has."""
    tokens = torch.randint(0, shape.vocab_size, (1, shape.max_seq_len + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].contiguous()
    return Microbatch((tokens[:, :-1].contiguous(),), None, {"labels": labels}), labels.numel()


def total_loss(output: titan_model.LossSums, _: None) -> Tensor:
    """Return the loss to differentiate."""
    return output.total


def in_group(world: int, measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `measure` returns on rank 0 of a group of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_serve, (world, folder, measure, arguments), nprocs=world)  # type: ignore[no-untyped-call]
        return json.loads(Path(folder, "result").read_text())


def _serve(rank: int, world: int, folder: str, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = measure(*arguments)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def machine() -> str:
    """Return the machine and the versions, for the head of a table."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, {versions}"
