"""Modules that compute with their rank's own part of each weight, as plain tensors, while the weights stay DTensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

Use = Literal["own", "factor", "term"]
"""How a rank uses what it has of a parameter.

`own`: its gradient is complete, or is that of its own shard. For a parameter that every rank has in whole, but uses
for a part of a sum over ranks, so that each has a part of the gradient: `factor` if it multiplies that part, `term` if
it is added to it, in which case every rank adds its share.
"""

_SPLITTING = frozenset({"ep", "tp"})  # the mesh dims that parameters lie on where code computes with them


def read_locally(module: nn.Module, uses: Mapping[str, Use]) -> None:
    """Let a module's own code see, under the names of parameters, this rank's part of each.

    The parameters stay what they are, under their names, to whoever lists them: optimizers, state dicts, FSDP. The
    module becomes an instance of a subclass of its class. While FSDP keeps a parameter sharded, there is no such part.

    Args:
        module: The module.
        uses: Names of its direct parameters, which are DTensors when its code runs, and how that uses them.
    """
    if not uses:
        return
    kind = type(module)
    readers = {name: property(_reader(name, use)) for name, use in uses.items()}
    module.__class__ = type(f"Local{kind.__name__}", (kind,), dict(readers))


def _reader(name: str, use: Use):  # type: ignore[no-untyped-def]
    def read(module: nn.Module) -> Tensor:
        parameter = module._parameters[name]
        assert isinstance(parameter, DTensor)
        if not _SPLITTING.issuperset(parameter.device_mesh.mesh_dim_names or ()):
            return parameter  # to FSDP, which looks at it in the same way
        if use == "own":
            return parameter.to_local()
        placements, mesh = parameter.placements, parameter.device_mesh
        parts = [Partial() if placement.is_replicate() else placement for placement in placements]
        local = parameter.to_local(grad_placements=parts)
        if use == "factor":
            return local
        # A list, since compiled code takes no generators here.
        return local / math.prod([mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate()])

    return read
