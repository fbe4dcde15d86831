"""Key/value projections under tensor parallelism with fewer key/value heads than ranks: several ranks hold one head.

Rank `r` of `tp` computes the query heads from `r * H / tp` on, all of which attend to key/value head `r * Hkv // tp`.
Each rank that holds a head accumulates the part of the head's gradient that comes from its own query heads; the parts
are summed once per step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from titan_parallel._torch_compat import unflatten_mesh
from titan_parallel.errors import LayoutError

_HELD = (Shard(0), Replicate())  # over heads, over the ranks that hold the same head
_GRADIENT = (Shard(0), Partial())


def shared_heads_mesh(mesh: DeviceMesh, kv_heads: int) -> DeviceMesh | None:
    """Return the ranks of `mesh` grouped by the head that they hold, or None if each rank has its own heads.

    Args:
        mesh: The one-dimensional tensor-parallel mesh; its size is a multiple of `kv_heads` or divides it.
        kv_heads: Number of key/value heads.
    """
    if kv_heads >= mesh.size():
        return None
    return unflatten_mesh(mesh, (kv_heads, mesh.size() // kv_heads), ("tp_heads", "tp_copies"))


def share_heads(model: nn.Module, name: str, mesh: DeviceMesh, heads: DeviceMesh) -> None:
    """Replace a linear of `model` by one whose outputs are split over key/value heads.

    Args:
        model: The model that contains the linear.
        name: Name of the linear that projects to keys or values.
        mesh: The tensor-parallel mesh.
        heads: The same ranks, from `shared_heads_mesh`.

    Raises:
        LayoutError: If the module is not an `nn.Linear`, or its outputs do not divide.
    """
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear:
        raise LayoutError(
            f"{name!r} is a {type(linear).__name__}; with fewer key/value heads than tp ranks 'colwise_kv' requires "
            "an nn.Linear"
        )
    if linear.out_features % heads.size(0):
        raise LayoutError(
            f"{name!r} has {linear.out_features} outputs, which do not divide into {heads.size(0)} key/value heads; "
            "correct plan['heads']"
        )
    model.set_submodule(name, _SharedHeads(linear, mesh, heads))


class _SharedHeads(nn.Linear):
    """Map full activations to the head that this rank holds, as a regular tensor.

    Parameters have the shapes of the replaced linear. DTensor's dispatch over a mesh of two dims would sum the
    gradients of a head's activations over its ranks in each backward; here the gradients of the weights are summed,
    once per step.
    """

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, heads: DeviceMesh) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.train(linear.training)
        self.mesh = mesh
        for name, parameter in linear.named_parameters():
            held = nn.Parameter(distribute_tensor(parameter, heads, _HELD), requires_grad=parameter.requires_grad)
            self.register_parameter(name, held)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False)
        # Only if needed: redistributing a replicated tensor would sum its gradient here, not where it was gathered.
        if x.placements != (Replicate(),):
            x = x.redistribute(placements=(Replicate(),))
        full = x.to_local(grad_placements=(Partial(),))
        return F.linear(full, _local(self.weight), None if self.bias is None else _local(self.bias))


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local(grad_placements=_GRADIENT)
