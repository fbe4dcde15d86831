"""A case on the router alone: parts of sequences on several ranks against full sequences on one."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist

import titan_model
from titan_parallel import Degrees, build_mesh
from titan_train.assembly import share_sequences
from titan_train.check import model_config
from titan_train.config import Config


def router_of_parts(config: Config, compiled: bool) -> list[float]:
    """Return how far gradients and load of ranks with parts of each sequence are from those of full sequences."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch._dynamo.reset()
    torch.manual_seed(0)
    parts = titan_model.build(model_config(config), "cpu").layers["0"].ffn.router
    full = copy.deepcopy(parts)
    share_sequences([parts], build_mesh(Degrees(cp=world_size), "cpu")["cp"])
    if compiled:
        parts.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, parts.weight.shape[1])
    for router, mine in ((full, x), (parts, x.chunk(world_size, 1)[rank])):
        titan_model.set_num_target_tokens(router, 1)
        weights, _ = router(mine)
        weights.square().sum().backward()
    for summed in (parts.weight.grad, parts.load):
        dist.all_reduce(summed)
    return [
        float((parts.weight.grad - full.weight.grad).abs().max() / full.weight.grad.abs().max()),
        float((parts.load - full.load).abs().max() / full.load.abs().max()),
    ]
