"""The mixture-of-experts layer of a block: top-k routing, no token dropped.

Called by `decoder.Block`. Sends each token to the experts that the router chose and adds up their weighted outputs.

Shapes: `T` tokens (`B * S`), `k` experts per token, `N` pairs of token and expert (`T * k`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titan_model.config import DecoderConfig
from titan_model.layers.feed_forward import FeedForward
from titan_model.moe.experts import Experts
from titan_model.moe.router import Router


class MoE(nn.Module):
    """Mixture of experts: each token is processed by `k` experts and the shared one, if any; the outputs are added.

    Args:
        config: The decoder's shape, with `moe` set.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.router = Router(config.dim, moe)
        # A separate module, so that expert parallelism can exchange rows before and after it.
        self.experts = Experts(moe.n_experts, config.dim, moe.ffn_dim)
        self.shared = FeedForward(config.dim, moe.shared_ffn_dim) if moe.shared_ffn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by its experts: `[..., S, D]` to the same shape."""
        weights, chosen = self.router(x)  # [T, k] both
        flat = chosen.flatten()  # [N]
        order = flat.argsort(stable=True)  # pairs sorted by expert
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        counts = flat.new_zeros(self.router.moe.n_experts).scatter_add_(0, flat, torch.ones_like(flat))

        rows = _Dispatch.apply(x.flatten(0, -2), order, inverse, chosen.shape[1])  # [N, D]
        rows = _Combine.apply(self.experts(rows, counts), order, inverse)
        pairs = rows.view(*chosen.shape, x.shape[-1])  # [T, k, D]
        out = torch.bmm(weights.to(pairs.dtype)[:, None], pairs).view(x.shape)
        return out if self.shared is None else out + self.shared(x)


class _Dispatch(torch.autograd.Function):
    """Gathers each pair's token, sorted by expert.

    The backward is a gather too. Torch's own backward would be a scatter, which adds in a nondeterministic order on
    CUDA.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        by_token = grad.index_select(0, inverse).view(len(inverse) // ctx.k, ctx.k, grad.shape[-1])
        return by_token.sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Restores the order of tokens; forward and backward are gathers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None
