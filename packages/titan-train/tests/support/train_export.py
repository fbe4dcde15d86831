"""Cases of the way out to Hugging Face's format and back, over several ranks."""

from pathlib import Path

import torch
import torch.distributed as dist

import titan_ckpt
import titan_model
from titan_train.assembly import assemble
from titan_train.check import check
from titan_train.config import Config
from titan_train.distributed import Process
from train_cases import run_here, weights_digest


def export_folder(config: Config) -> Path:
    """Return the folder of a run's last export."""
    return Path(config.run.folder) / "huggingface" / f"step-{config.training.steps:08d}"


def trained_and_loaded_again(config: Config) -> tuple[str, str, str]:
    """Train and export; then fill a new model with the export. Return digests: new, filled, and of the checkpoint."""
    run_here(config)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    run = assemble(check(config, world_size), Process(rank, world_size, torch.device("cpu")))
    new = weights_digest(run)
    source = titan_ckpt.open_source(export_folder(config))
    titan_ckpt.load_into(run.model.state_dict(), source, titan_model.huggingface_map(run.model_config))
    filled = weights_digest(run)
    run.checkpointer.load(run.state(), required=True)
    trained = weights_digest(run)
    run.checkpointer.close()
    return new, filled, trained
