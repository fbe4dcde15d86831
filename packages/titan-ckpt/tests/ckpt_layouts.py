"""States in every layout: DTensors over meshes with given placements, filled so that the whole is known everywhere.

No training is needed to lay a tensor out: each rank cuts its shard from the whole tensor, as torch would.
"""

import functools
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckpt_states import Held
from titan_ckpt import Checkpointer

LAYERS = 4
# Sizes that most degrees do not divide; the last axis of an expert's weight is that of its output.
SHAPES: dict[str, tuple[int, ...]] = {
    "attention.w": (10, 12),
    "attention.out": (12, 10),
    "norm.scale": (10,),
    "experts.w": (8, 6, 5),
}
# What a layout is made of on so many ranks: (mesh shape, mesh dims); the product is the world.
Layout = tuple[str, int]
MESHES: dict[str, dict[int, tuple[tuple[int, ...], tuple[str, ...]]]] = {
    "FSDP": {n: ((n,), ("fsdp",)) for n in (1, 2, 4, 8)},
    "HSDP": {2: ((2, 1), ("dp", "fsdp")), 4: ((2, 2), ("dp", "fsdp")), 8: ((2, 4), ("dp", "fsdp"))},
    "TP": {n: ((n,), ("tp",)) for n in (2, 4, 8)},
    "PP": {n: ((n,), ("pp",)) for n in (2, 4)},
    "FSDPxTP": {4: ((2, 2), ("fsdp", "tp")), 8: ((4, 2), ("fsdp", "tp"))},
    "FSDPxTPxPP": {8: ((2, 2, 2), ("pp", "fsdp", "tp"))},
    "EP": {2: ((2,), ("ep",)), 4: ((2, 2), ("fsdp", "ep")), 8: ((2, 4), ("fsdp", "ep"))},
}


def layouts(*worlds: int) -> list[Layout]:
    """All layouts on so many ranks."""
    return [(kind, world) for kind, meshes in MESHES.items() for world in meshes if world in worlds]


def whole_state(seed: int) -> dict[str, torch.Tensor]:
    """The whole tensors, the same on every rank: weights, and what AdamW keeps of them."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in SHAPES]
    state = {}
    for name in names:
        shape = SHAPES[name.split(".", 2)[2]]
        state[f"model/{name}"] = torch.randn(shape, generator=generator).to(torch.bfloat16)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"optimizer/{name}.{moment}"] = torch.randn(shape, generator=generator)
        state[f"optimizer/{name}.step"] = torch.tensor(float(seed))
    return state


@functools.lru_cache
def mesh_of(kind: str) -> DeviceMesh:
    shape, dims = MESHES[kind][dist.get_world_size()]
    return init_device_mesh("cpu", shape, mesh_dim_names=dims)


def laid_out(kind: str, state: dict[str, torch.Tensor]) -> dict[str, Held]:
    """Cut a whole state into what this rank has of it."""
    mesh = mesh_of(kind)
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    for key, tensor in state.items():
        entry, name = key.split("/")
        if _owned(mesh, int(name.split(".")[1])):
            parts[entry][name] = _sharded(mesh, name, tensor)
    return {entry: Held(**tensors) for entry, tensors in parts.items()}


def _owned(mesh: DeviceMesh, layer: int) -> bool:
    """Pipeline stages own whole layers, and others do not have them at all."""
    names = mesh.mesh_dim_names or ()
    return "pp" not in names or layer % mesh["pp"].size() == mesh["pp"].get_local_rank()


def _sharded(mesh: DeviceMesh, name: str, tensor: torch.Tensor) -> torch.Tensor:
    dims = [dim for dim in mesh.mesh_dim_names or () if dim != "pp"]
    if not dims or tensor.ndim == 0:
        return tensor.clone()
    local = tensor
    if "tp" in dims and "norm" not in name:  # first, as the model is split before FSDP gets it
        axis = 1 if "out" in name else 0
        split = distribute_tensor(local, mesh["tp"], [Shard(axis)], src_data_rank=None)
        if dims == ["tp"]:
            return split
        return _fully_shard(mesh["fsdp", "tp"], split, axis, tensor.shape)
    inner = mesh[tuple(dims)] if len(dims) > 1 else mesh[dims[0]]
    placements = [_placement(dim, name) for dim in dims]
    return distribute_tensor(local, inner, placements, src_data_rank=None)


def _fully_shard(mesh: DeviceMesh, split: DTensor, axis: int, shape: torch.Size) -> DTensor:
    """As FSDP2 shards what TP has split: along the first axis, within each TP rank's part."""
    from torch.distributed.tensor.placement_types import _StridedShard

    rows = split.to_local().chunk(mesh["fsdp"].size())
    place = mesh["fsdp"].get_local_rank()
    local = rows[place] if place < len(rows) else split.to_local()[:0]
    fsdp = _StridedShard(0, split_factor=mesh["tp"].size()) if axis == 0 else Shard(0)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        local.contiguous(), mesh, [fsdp, Shard(axis)], run_check=False, shape=shape, stride=strides
    )


def _placement(dim: str, name: str) -> Any:
    if dim == "dp" or (dim == "tp" and "norm" in name) or (dim == "ep" and "experts" not in name):
        return Replicate()
    # Experts are split by expert, and FSDP shards what is left along another axis.
    return Shard(1) if dim == "fsdp" and "experts" in name else Shard(0)


def save_laid_out(folder: Path, kind: str, seed: int, asynchronous: bool) -> None:
    ckpt = Checkpointer(folder, asynchronous=asynchronous)
    ckpt.save(seed, laid_out(kind, whole_state(seed)))
    ckpt.close()


def load_laid_out(cases: list[tuple[Path, str, int]]) -> list[str]:
    """Load each case into a state of zeros and compare every shard with what it must be; return what differs."""
    wrong = []
    for folder, kind, seed in cases:
        wanted = laid_out(kind, whole_state(seed))
        zeros = {entry: Held(**{name: torch.zeros_like(t) for name, t in held.state.items()}) for entry, held in
                 wanted.items()}  # fmt: skip
        ckpt = Checkpointer(folder)
        ckpt.load(zeros, step=seed)
        ckpt.close()
        for entry, held in wanted.items():
            wrong += [
                f"{folder.name} to {kind}: {entry}/{name}"
                for name, tensor in held.state.items()
                if not torch.equal(_local(tensor), _local(zeros[entry].state[name]))
            ]
    return wrong


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
