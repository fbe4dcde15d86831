"""A job of torchtitan's: its model, optimizers, schedule, data loader and checkpoint manager, on a gloo group."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, default_adamw
from torchtitan.models.llama3 import model_registry

from titan_ckpt import load_into, open_source


class Counting(IterableDataset[Any]):
    at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.at += 1
            yield torch.tensor(self.at)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Progress:
    def __init__(self) -> None:
        self.step = self.ntokens_seen = 0

    def state_dict(self) -> dict[str, int]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


class Job:
    def __init__(self, folder: Path, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        with torch.device("meta"):
            self.model = model_registry("debugmodel").model.build()
        for layer in self.model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device="cpu")
        with torch.no_grad():
            for weight in self.model.parameters():
                torch.nn.init.normal_(weight)
        config = default_adamw(lr=8e-4)
        config.implementation = "for-loop"
        self.optimizers = OptimizersContainer(config, model_parts=[self.model])
        self.schedule = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=self.optimizers, training_steps=9)
        self.data = ParallelAwareDataloader(
            Counting(), dp_rank=dist.get_rank(), dp_world_size=dist.get_world_size(), batch_size=2
        )
        self.progress = Progress()
        self.manager = CheckpointManager(
            CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False, **options),
            dataloader=self.data,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedule,
            states={"train_state": self.progress},
            sd_adapter=None,
            base_folder=str(folder),
        )

    def train(self, steps: int) -> None:
        batches = iter(self.data)
        for _ in range(steps):
            next(batches)
            for weight in self.model.parameters():
                weight.grad = torch.randn_like(weight)
            self.optimizers.step()
            self.schedule.step()
            self.progress.step += 1
            self.progress.ntokens_seen += 4096
            self.manager.save(self.progress.step)
        self.manager.maybe_wait_for_saving()

    def state(self) -> dict[str, Any]:
        """Return all that the checkpoint should hold, by titan's names; every tensor whole."""
        optimizer = {f"optimizer/{name}": value for name, value in self.optimizers.state_dict().items()}
        others = {"train_state": self.progress, "lr_scheduler": self.schedule}
        values = {f"{of}/{name}": value for of, it in others.items() for name, value in it.state_dict().items()}
        state = {**self.model.state_dict(), **optimizer, **values}
        whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in whole.items()}


def save(folder: Path, async_mode: str) -> dict[str, Any]:
    job = Job(folder, 1, async_mode=async_mode)
    job.train(2)
    job.manager.close()
    return job.state()


def resume(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state before and after torchtitan's own loading."""
    job = Job(folder, 2, exclude_from_loading=["dataloader"])
    before = job.state()
    assert job.manager.load()
    job.manager.close()
    return before, job.state()


def load_weights(folder: Path, weights: Path) -> dict[str, Any]:
    """Return the model's state after titan's loading into its shards."""
    job = Job(folder, 2)
    state = job.model.state_dict()
    load_into(state, open_source(weights), ignore=["optimizer/*"])
    job.model.load_state_dict(state)  # it holds q, k and v as one, and takes them apart for its state_dict
    job.manager.close()
    return {name: tensor for name, tensor in job.state().items() if name in state}
