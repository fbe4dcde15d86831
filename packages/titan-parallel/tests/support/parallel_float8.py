"""Cases in float8."""

from __future__ import annotations

from typing import Any

import torch

from parallel_cases import build, plan, train_laid_out
from parallel_mesh import cpu_mesh
from titan_parallel import Degrees, ParallelOptions, parallelize
from titan_parallel.float8 import is_float8


def converted(degrees: Degrees, options: ParallelOptions) -> tuple[list[str], list[str]]:
    """Return which linears multiply in float8, and the names of all parameters."""
    model = parallelize(build(False), cpu_mesh(degrees), plan(False), options)
    names = [name for name, module in model.parts[0].named_modules() if is_float8(module)]
    return names, list(model.state_dict())


def train_from_meta(degrees: Degrees, options: ParallelOptions) -> dict[str, Any]:
    """Train a model made on meta and filled with the weights that others are built with."""
    plain = build(False)
    with torch.device("meta"):
        net = type(plain)(False)
    model = parallelize(net, cpu_mesh(degrees), plan(False), options)
    model.materialize("cpu")
    one = parallelize(plain, cpu_mesh(degrees), plan(False), ParallelOptions(param_dtype="float32"))
    model.load_state_dict(one.state_dict())
    return train_laid_out(model)
