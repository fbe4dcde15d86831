"""A case on the router alone: parts of sequences on several ranks against whole sequences on one."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist

import titan_model
from titan_parallel import Degrees, build_mesh
from titan_train.assembly import model_config, share_sequences
from titan_train.config import Config


def router_of_parts(config: Config, compiled: bool) -> list[float]:
    """Return how far gradients and the record of two ranks with half of each sequence are from those of the whole."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch._dynamo.reset()
    torch.manual_seed(0)
    parts = titan_model.build(model_config(config), "cpu").layers["0"].ffn.router
    whole = copy.deepcopy(parts)
    share_sequences([parts], build_mesh(Degrees(cp=world_size), "cpu")["cp"])
    if compiled:
        parts.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, parts.weight.shape[1])
    for router, mine in ((whole, x), (parts, x.chunk(world_size, 1)[rank])):
        titan_model.set_loss_normaliser(router, 1)
        weights, _ = router(mine)
        weights.square().sum().backward()
    for summed in (parts.weight.grad, parts.load):
        dist.all_reduce(summed)
    return [
        float((parts.weight.grad - whole.weight.grad).abs().max() / whole.weight.grad.abs().max()),
        float((parts.load - whole.load).abs().max() / whole.load.abs().max()),
    ]
