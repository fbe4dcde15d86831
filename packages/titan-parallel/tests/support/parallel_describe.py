"""Cases about the table of a model."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from parallel_cases import Net, plan
from parallel_mesh import cpu_mesh
from titan_parallel import Degrees, ParallelOptions, parallelize


def table(
    degrees: Degrees, tied: bool, options: ParallelOptions | None = None
) -> tuple[str, int, dict[str, tuple[str, str]]]:
    """Return the table, the bytes of all local tensors, and shapes by name."""
    with torch.device("meta"):
        net = Net(tied)
    model = parallelize(net, cpu_mesh(degrees), plan(tied), options)
    model.materialize("cpu")
    locals_ = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    shapes = {
        name: (" x ".join(map(str, p.shape)), " x ".join(map(str, locals_[name].shape)))
        for name, p in model.named_parameters()
    }
    return model.describe(), sum(x.nbytes for x in locals_.values()), shapes
