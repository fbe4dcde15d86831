"""A mixture of experts written out token by token, and configs to hold the real one against it."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_model import DecoderConfig
from titan_model.config import MoEConfig
from titan_model.moe.layer import MoE

DIM = 16
SHAPE = DecoderConfig(
    vocab_size=29,
    dim=DIM,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    ffn_dim=24,
    max_seq_len=64,
    moe=MoEConfig(n_experts=4, top_k=2, ffn_dim=8),
)


def with_moe(**changes: object) -> DecoderConfig:
    assert SHAPE.moe is not None
    return replace(SHAPE, moe=replace(SHAPE.moe, **changes))


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill with weights large enough for every part, and every choice, to matter; selection biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(0.0, 0.1, generator=generator)


def random_mixture(seed: int = 0, **changes: object) -> MoE:
    module = MoE(with_moe(**changes))
    randomize(module, seed)
    return module


def random_input(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def scores_of(module: MoE, x: Tensor) -> Tensor:
    """Return the router's scores `[..., E]`."""
    logits = x @ module.router.weight.t()
    return torch.softmax(logits, -1) if module.router.moe.score == "softmax" else torch.sigmoid(logits)


def chosen_of(module: MoE, scores: Tensor) -> list[int]:
    """Return the experts of one token, given its scores `[E]`: the `k` best ones, bias included."""
    bias = torch.zeros_like(scores) if module.router.bias is None else module.router.bias
    return sorted(range(len(scores)), key=lambda e: -float(scores[e].detach() + bias[e]))[: module.router.moe.top_k]


def token_by_token(module: MoE, x: Tensor) -> Tensor:
    """Do what `module` is to do, with Python loops over tokens and experts and nothing grouped."""
    moe, experts = module.router.moe, module.experts
    out = []
    for token in x.flatten(0, -2):
        scores = scores_of(module, token)
        chosen = chosen_of(module, scores)
        total = sum(scores[e] for e in chosen) if moe.normalize_top_k else 1.0
        mixed = torch.zeros_like(token)
        for e in chosen:
            hidden = F.silu(experts.gate_proj[e] @ token) * (experts.up_proj[e] @ token)
            mixed = mixed + scores[e] / total * moe.route_scale * (experts.down_proj[e] @ hidden)
        if module.shared is not None:
            shared = module.shared
            hidden = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            mixed = mixed + shared.down_proj.weight @ hidden
        out.append(mixed)
    return torch.stack(out).view(x.shape) if out else torch.zeros_like(x)


def gradients(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of `x` and of every parameter, for an output gradient that is different everywhere."""
    tensors = {"x": x, **dict(module.named_parameters())}
    out = forward(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    found = torch.autograd.grad((out * weight).sum(), list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(tensors.items(), found, strict=True)
    }
