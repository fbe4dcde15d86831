# From packages/titan-parallel/README.md; written by tools/examples.py.

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from titan_parallel import Degrees, Microbatch, build_mesh, data_axis, parallelize, plan_from_transformers

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=4, use_cache=False, **SHAPE))


def cross_entropy(output, labels):
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")


dist.init_process_group("gloo")
tokens = torch.randint(0, 128, (8, 33), generator=torch.Generator().manual_seed(1))  # the global batch
inputs, labels = tokens[:, :-1], tokens[:, 1:]

for degrees in (Degrees(dp_shard=2, tp=2), Degrees(dp_shard=2, pp=2)):
    reference, model = build(), build()
    model = parallelize(model, build_mesh(degrees, "cpu"), plan_from_transformers(model))
    axis = data_axis(model.mesh)
    # two microbatches on this rank
    mine = [x.chunk(axis.dp_world_size)[axis.dp_rank].chunk(2) for x in (inputs, labels)]
    microbatches = [Microbatch((x,), y) for x, y in zip(*mine, strict=True)]
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3) for one in (reference, model)]
    for step in range(5):
        expected = cross_entropy(reference(inputs), labels) / labels.numel()
        expected.backward()
        loss = model.sum_parts(model.forward_backward(microbatches, cross_entropy, labels.numel()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert abs(loss - expected) < 1e-5, (step, loss, expected)
    if dist.get_rank() == 0:
        print(f"{degrees}: loss {loss:.4f}, as in one process")
dist.barrier()
dist.destroy_process_group()
