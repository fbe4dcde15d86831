# From packages/titan-parallel/README.md; written by tools/examples.py.

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from titan_parallel import Degrees, Microbatch, ParallelOptions, build_mesh, data_axis, parallelize


class Block(nn.Module):
    """Attention and feed-forward over patches, scaled, shifted and gated by the time."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, time):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """From a noisy 8 x 8 picture and a time in [0, 1] to the direction in which the noise goes."""

    def __init__(self, dim=64, heads=4, depth=4):
        super().__init__()
        self.inlet, self.place = nn.Linear(4, dim), nn.Parameter(torch.zeros(16, dim))
        self.clock = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.outlet = nn.Linear(dim, 4)

    def forward(self, picture, time):
        patches = F.pixel_unshuffle(picture, 2).flatten(2).transpose(1, 2)  # [B, 16, 4]
        x, time = self.inlet(patches) + self.place, self.clock(time[:, None])
        for block in self.blocks:
            x = block(x, time)
        return F.pixel_shuffle(self.outlet(x).transpose(1, 2).unflatten(2, (4, 4)), 2)


def squared_error(output, target):
    return (output - target).square().sum()


device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
torch.manual_seed(0)  # weights must be equal on all ranks

mesh = build_mesh(Degrees(dp_shard=-1), device)
plan = {"blocks": ["blocks.*"], "before": ["inlet", "clock"], "after": ["outlet"]}
options = ParallelOptions(activation_checkpointing="full", compile_blocks=True)
model = parallelize(DiT().to(device), mesh, plan, options)
axis = data_axis(mesh)  # this rank reads part `axis.dp_rank` of `axis.dp_world_size`

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(60):
    generator = torch.Generator().manual_seed(step)
    pictures = torch.ones(64, 1, 8, 8).triu() * torch.rand(64, 1, 1, 1, generator=generator)  # the global batch
    noise, time = torch.randn(64, 1, 8, 8, generator=generator), torch.rand(64, generator=generator)
    mixed = pictures + time[:, None, None, None] * (noise - pictures)
    x, t, y = (z.chunk(axis.dp_world_size)[axis.dp_rank].to(device) for z in (mixed, time, noise - pictures))
    loss = model.forward_backward([Microbatch((x, t), y)], squared_error, num_target_tokens=pictures.numel())
    model.clip_grad_norm(1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(model.sum_parts(loss).item())

if dist.get_rank() == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
dist.barrier()  # a rank that exits at once may do so while gloo's threads still use its tensors
dist.destroy_process_group()
