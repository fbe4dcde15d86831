"""One state in every layout: DTensors over meshes with given placements, cut so that the whole is known everywhere.

No training is needed to lay a tensor out: each rank cuts its shard from the whole tensor, as torch would. The mesh is
made as a trainer makes it: six dims, of which FSDP takes several as one (`_flatten`), put before those that have split
the tensor already (`_concatenate`).
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt_states import Held
from titan_ckpt import Checkpointer

STEP = 7
DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")
# The degrees of each layout, by number of ranks; those left out are 1, and the product is the world size.
Layout = tuple[str, int]
KINDS: dict[str, dict[int, dict[str, int]]] = {
    "FSDP": {n: {"dp_shard": n} for n in (1, 2, 4, 8)},
    "FSDPxCP": {4: {"dp_shard": 2, "cp": 2}},
    "HSDP": {n: {"dp_replicate": 2, "dp_shard": n // 2} for n in (2, 4, 8)},
    "TP": {n: {"tp": n} for n in (2, 4, 8)},
    "PP": {n: {"pp": n} for n in (2, 4)},
    "FSDPxTP": {n: {"dp_shard": n // 2, "tp": 2} for n in (4, 8)},
    "HSDPxTP": {8: {"dp_replicate": 2, "dp_shard": 2, "tp": 2}},
    "FSDPxPP": {4: {"dp_shard": 2, "pp": 2}, 8: {"dp_shard": 2, "pp": 4}},
    "TPxPP": {4: {"tp": 2, "pp": 2}},
    "FSDPxTPxPP": {8: {"dp_shard": 2, "tp": 2, "pp": 2}},
    "EP": {2: {"ep": 2}, 4: {"dp_shard": 2, "ep": 2}, 8: {"dp_shard": 2, "ep": 4}},
    "EPxTP": {4: {"ep": 2, "tp": 2}, 8: {"dp_shard": 2, "ep": 2, "tp": 2}},
    "EPxPP": {4: {"ep": 2, "pp": 2}},
    "HSDPxEP": {4: {"dp_replicate": 2, "ep": 2}, 8: {"dp_replicate": 2, "dp_shard": 2, "ep": 2}},
    "HSDPxEPxTP": {8: {"dp_replicate": 2, "ep": 2, "tp": 2}},
    # The first stage is one rank, the second is sharded over all others: they hold the tied weight in different cuts.
    "uneven stages": {4: {}},
}
# Of which block, the shape, and which axis FSDP, EP and TP split (None: leaves it whole); sizes that most degrees do
# not divide. Where two split the same axis, FSDP's shards are within the other's. Of no block is what the first and the
# last pipeline stage tie.
WEIGHTS: dict[str, tuple[int | None, tuple[int, ...], int, int | None, int | None]] = {
    "tied": (None, (11, 5), 0, None, 0),
    "attention.in": (0, (9, 7), 0, None, 0),
    "norm.scale": (0, (10,), 0, None, None),
    "experts.gate": (1, (6, 5, 7), 2, 0, 1),
    "experts.up": (1, (6, 9, 3), 1, 0, 1),
    "attention.out": (2, (7, 10), 0, None, 1),
    "experts.down": (3, (6, 7, 5), 1, 0, 2),
    "experts.scale": (3, (6, 5), 0, 0, 1),
}


def layouts(*worlds: int) -> list[Layout]:
    """All layouts for a number of ranks."""
    return [(kind, world) for kind, degrees in KINDS.items() for world in degrees if world in worlds]


@functools.lru_cache
def whole_state() -> dict[str, torch.Tensor]:
    """The whole tensors, the same on every rank: weights, and what AdamW keeps of them."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (name, (_, shape, *_)) in enumerate(WEIGHTS.items()):
        state[f"model/{name}"] = torch.randn(shape, generator=generator).to(torch.bfloat16)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"optimizer/{name}.{moment}"] = torch.randn(shape, generator=generator)
        state[f"optimizer/{name}.step"] = torch.tensor(float(number))
    return state


class Laid:
    """A layout on the ranks there are: which meshes it has, and what of the state this rank holds."""

    def __init__(self, kind: str) -> None:
        if kind == "uneven stages":
            self._stage, self._stages = min(dist.get_rank(), 1), 2
            second = DeviceMesh("cpu", list(range(1, dist.get_world_size())), mesh_dim_names=("fsdp",))
            mesh = second if self._stage else None
            self._joint = {False: mesh, True: mesh}
            return
        self._degrees = dict.fromkeys(DIMS, 1) | KINDS[kind][dist.get_world_size()]
        self._mesh = init_device_mesh("cpu", tuple(self._degrees.values()), mesh_dim_names=DIMS)
        self._stage, self._stages = self._mesh.get_local_rank("pp"), self._degrees["pp"]
        # Both on every rank, whichever it needs: meshes make process groups, which all ranks make in the same order.
        self._joint = {expert: self._joint_mesh(expert=expert) for expert in (False, True)}

    def state(self) -> dict[str, Held]:
        """Cut the whole state into what this rank has of it."""
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
        for key, tensor in whole_state().items():
            entry, name = key.split("/")
            weight = name if name in WEIGHTS else name.rpartition(".")[0]
            if self._owns(WEIGHTS[weight][0]):
                parts[entry][name] = self._sharded(weight, tensor) if tensor.ndim else tensor.clone()
        return {entry: Held(**tensors) for entry, tensors in parts.items()}

    def _owns(self, block: int | None) -> bool:
        """Stages own whole blocks, which others do not have at all; the first and the last have the tied weight."""
        return self._stage in (0, self._stages - 1) if block is None else block % self._stages == self._stage

    def _sharded(self, weight: str, whole: torch.Tensor) -> torch.Tensor:
        _, _, fsdp_axis, ep_axis, tp_axis = WEIGHTS[weight]
        expert = ep_axis is not None
        joint = self._joint[expert]
        if joint is None:  # nothing splits it
            return whole.clone()
        axes = {"dp_replicate": None, "ep": ep_axis, "tp": tp_axis}
        names = joint.mesh_dim_names or ()
        at = {name: (joint.size(place), joint.get_local_rank(name)) for place, name in enumerate(names)}
        local, split = whole, dict.fromkeys(range(whole.ndim), 1)
        for dim in ("tp", "ep"):  # first, as the model is split before FSDP gets it
            if dim in at and (axis := axes[dim]) is not None:
                local = _cut(local, axis, *at[dim])
                split[axis] *= at[dim][0]
        fsdp = next((name for name in names if name.endswith("fsdp")), None)
        placements: list[Placement] = []
        for name in names:
            axis = fsdp_axis if name == fsdp else axes[name]
            if axis is None:
                placements.append(Replicate())
            elif name == fsdp and split[axis] > 1:
                placements.append(_StridedShard(axis, split_factor=split[axis]))
            else:
                placements.append(Shard(axis))
        if fsdp is not None:
            local = _cut(local, fsdp_axis, *at[fsdp])
        return _dtensor(local.contiguous(), joint, placements, whole.shape)

    def _joint_mesh(self, *, expert: bool) -> DeviceMesh | None:
        """Return the mesh of a dense weight or of an expert's; None where nothing splits it."""
        fsdp_dims = ("dp_shard", "cp") if expert else ("dp_shard", "cp", "ep")
        shard = self._mesh[fsdp_dims]._flatten("expert_fsdp" if expert else "fsdp")
        before = [self._mesh["dp_replicate"]] if self._degrees["dp_replicate"] > 1 else []
        after = [self._mesh[dim] for dim in ("ep", "tp") if self._degrees[dim] > 1 and (expert or dim != "ep")]
        # FSDP over one rank is left out where something else makes a mesh, and stands alone where nothing does.
        middle = [shard] if shard.size() > 1 or (not after and self._degrees["pp"] == 1) else []
        parts = [*before, *middle, *after]
        return parts[0] if len(parts) == 1 else DeviceMesh._concatenate(parts) if parts else None


def _cut(tensor: torch.Tensor, axis: int, parts_wanted: int, place: int) -> torch.Tensor:
    parts = tensor.chunk(parts_wanted, axis)
    return parts[place] if place < len(parts) else tensor.narrow(axis, 0, 0)


def _dtensor(local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=strides)


@functools.lru_cache
def laid(kind: str) -> Laid:
    """Return a layout; its meshes, and so its process groups, are made once."""
    return Laid(kind)


def save_laid_out(cases: list[tuple[Path, str, bool]]) -> None:
    for folder, kind, asynchronous in cases:
        ckpt = Checkpointer(folder, asynchronous=asynchronous)
        ckpt.save(STEP, laid(kind).state())
        ckpt.close()


def load_laid_out(folders: list[Path], kinds: list[str]) -> list[str]:
    """Load each folder into zeros of each kind and compare every shard with what it must be; return what differs."""
    wrong = []
    for kind in kinds:
        wanted, blank = laid(kind).state(), laid(kind).state()
        for folder in folders:
            for held in blank.values():
                for tensor in held.state.values():
                    _local(tensor).zero_()
            ckpt = Checkpointer(folder, process_group=dist.group.WORLD)
            ckpt.load(blank, step=STEP)
            ckpt.close()
            wrong += [
                f"{folder.name} to {kind}: {entry}/{name}"
                for entry, held in wanted.items()
                for name, tensor in held.state.items()
                if not torch.equal(_local(tensor), _local(blank[entry].state[name]))
            ]
    return wrong


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
