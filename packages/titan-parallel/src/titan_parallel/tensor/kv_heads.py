"""Key/value heads under tensor parallelism where there are fewer of them than ranks: each is held by several ranks.

Rank `r` of `tp` computes query heads `r * H / tp` and on, all of which look at key/value head `r * Hkv // tp`. Each of
the ranks that hold a head gathers the part of its gradient that is due to its own query heads; the parts' sum is the
head's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from titan_parallel.errors import LayoutError

_HELD = (Shard(0), Replicate())  # over heads, over the ranks that hold the same one
_GRADIENT = (Shard(0), Partial())


def shared_heads_mesh(mesh: DeviceMesh, kv_heads: int) -> DeviceMesh | None:
    """Return the ranks of `mesh` by the head that they hold, or None if there is a head for each of them.

    Args:
        mesh: The one-dimensional tensor-parallel mesh; its size is a multiple of `kv_heads` or divides it.
        kv_heads: How many heads there are.
    """
    if kv_heads >= mesh.size():
        return None
    unflattened: DeviceMesh = mesh._unflatten(0, (kv_heads, mesh.size() // kv_heads), ("tp_heads", "tp_copies"))
    return unflattened


def share_heads(model: nn.Module, name: str, mesh: DeviceMesh, heads: DeviceMesh) -> None:
    """Put in place of a linear of `model` one whose outputs are split over heads.

    Args:
        model: Holds it.
        name: Of the linear that projects to keys or values.
        mesh: The tensor-parallel mesh.
        heads: The same ranks, from `shared_heads_mesh`.

    Raises:
        LayoutError: If it is more than a linear, or its outputs do not divide.
    """
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear:
        raise LayoutError(
            f"{name!r} is a {type(linear).__name__}; with fewer key/value heads than ranks it has to be an nn.Linear"
        )
    if linear.out_features % heads.size(0):
        raise LayoutError(
            f"{name!r} has {linear.out_features} outputs, which are no {heads.size(0)} heads as 'heads' says"
        )
    model.set_submodule(name, _SharedHeads(linear, mesh, heads))


class _SharedHeads(nn.Linear):
    """Maps whole activations to the head that this rank holds, as a plain tensor.

    Its parameters have the shapes of the linear in whose place it is. torch's own dispatch over a mesh of two dims
    would sum the gradients of a head's activations over its ranks in each backward; here those of the weights are
    summed, once in a step.
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
        if x.placements != (Replicate(),):  # else torch would sum the gradient here, and not where x was gathered
            x = x.redistribute(placements=(Replicate(),))
        whole = x.to_local(grad_placements=(Partial(),))
        return F.linear(whole, _local(self.weight), None if self.bias is None else _local(self.bias))


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local(grad_placements=_GRADIENT)
