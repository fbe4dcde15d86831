"""Cases about the arguments of FSDP2."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from parallel_cases import Net, batch, build, plan, summed_loss
from parallel_mesh import cpu_mesh
from titan_parallel import Degrees, Microbatch, ParallelOptions, parallelize


def offloaded() -> tuple[list[bool], set[str], set[str]]:
    """Return which units offload, and where weights, gradients and buffers of a model built on meta then are."""
    with torch.device("meta"):
        net = Net(False)
    model = parallelize(net, cpu_mesh(Degrees()), plan(False), ParallelOptions(cpu_offload=True))
    model.materialize("cpu")
    model.load_state_dict({name: _filled(value) for name, value in model.state_dict().items()})
    tokens, labels = batch(0)
    model.forward_backward([Microbatch((tokens,), labels)], summed_loss, labels.numel())
    units = [module for module in model.parts[0].modules() if isinstance(module, FSDPModule)]
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    offload = [isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups if group is not None]
    places = {str(p.device) for p in model.parameters()} | {str(p.grad.device) for p in model.parameters()}
    return offload, places, {str(buffer.device) for part in model.parts for buffer in part.buffers()}


def gathered_between(options: ParallelOptions) -> list[int]:
    """Return over how many ranks each block's weights are sharded between its forward and its backward."""
    model = parallelize(build(False), cpu_mesh(Degrees()), plan(False), options)
    tokens, labels = batch(0)
    found = []

    def look(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for block in model.parts[0].stack:
            weight = block.mlp[0].weight
            ratio = 1 if not isinstance(weight, DTensor) else weight.numel() // weight.to_local().numel()
            found.append(ratio)
        return summed_loss(output, target)

    model.forward_backward([Microbatch((tokens,), labels)], look, labels.numel())
    return found


def _filled(value: torch.Tensor) -> torch.Tensor:
    return torch.full_like(value, 0.1)
