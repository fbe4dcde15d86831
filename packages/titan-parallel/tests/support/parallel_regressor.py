"""A regression model, with parameters in unusual places."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_cases import full_state
from parallel_mesh import cpu_mesh
from titan_parallel import Degrees, Microbatch, ParallelOptions, ParallelPlan, data_axis, parallelize

FEATURES, DIM, HEADS, SEQ, ROWS, STEPS = 6, 32, 4, 8, 8, 4

PLAN: ParallelPlan = {
    "blocks": ["layers.*"],
    "before": ["inlet"],
    "after": ["outlet"],
    "tensor": {
        "inlet": "sequence",  # gets regular tensors
        "place": "replicate",  # a parameter of the model itself
        "clock": "replicate",  # a module beside the stream of activations
        "layers.*.norm": "sequence",  # called by keyword, with a scale beside its input
        "layers.*.gain": "replicate",  # a parameter of a block
        "layers.*.qkv.*": "colwise",
        "layers.*.out": "rowwise",
        "outlet": "sequence",  # the loss meets what it returns
    },
}


class ScaledNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.inner(x) * scale


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ScaledNorm()
        self.qkv = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(3)])
        self.out = nn.Linear(DIM, DIM)
        self.gain = nn.Parameter(torch.ones(DIM))
        self.register_buffer("scale", torch.full((DIM,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x=x, scale=self.scale)
        q, k, v = (m(y).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for m in self.qkv)
        return x + self.gain * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(FEATURES, DIM)
        self.place = nn.Parameter(torch.zeros(SEQ, DIM))
        self.clock = nn.Sequential(nn.Linear(1, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.outlet = nn.Linear(DIM, 1)

    def forward(self, x: Tensor, *, time: Tensor) -> dict[str, Tensor]:
        x = self.inlet(x) + self.place + self.clock(time).unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return {"value": self.outlet(x)}


def build() -> Regressor:
    torch.manual_seed(5)
    model = Regressor()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.layers[1].norm.inner.bias.requires_grad_(False)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(ROWS, SEQ, FEATURES, generator=generator)
    time = torch.rand(ROWS, 1, generator=generator)
    return x, time, x.cumsum(1).mean(2, keepdim=True) * (1 + time.unsqueeze(1))


def squared_error(output: dict[str, Tensor], wanted: Tensor) -> Tensor:
    return (output["value"] - wanted).square().sum()


def trainable(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def reference() -> dict[str, Any]:
    model = build()
    optimizer = torch.optim.SGD(trainable(model.parameters()), lr=2e-2)
    losses = []
    for _ in range(STEPS):
        x, time, wanted = batch()
        loss = squared_error(model(x, time=time), wanted) / wanted.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "weights": {name: p.detach() for name, p in model.named_parameters()}}


def train(degrees: Degrees, options: ParallelOptions) -> dict[str, Any]:
    model = parallelize(build(), cpu_mesh(degrees), PLAN, options)
    optimizer = torch.optim.SGD(trainable(model.parameters()), lr=2e-2)
    place = data_axis(model.mesh)
    losses = []
    for _ in range(STEPS):
        x, time, wanted = (t.chunk(place.dp_world_size)[place.dp_rank] for t in batch())
        part = model.forward_backward([Microbatch((x,), wanted, {"time": time})], squared_error, ROWS * SEQ)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    return {"losses": losses, "weights": full_state(model), "frozen": frozen}
