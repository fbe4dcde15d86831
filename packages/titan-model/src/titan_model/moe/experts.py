"""The experts of a block: many feed-forwards, each over its own tokens, in three grouped matrix products.

Called by `moe.layer`, which sorts tokens by expert before and restores their order after.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_model.fused_ops import autocast_dtype


class Experts(nn.Module):
    """SwiGLU feed-forwards, each applied to its own rows of the input.

    Expert parallelism gives each rank some of the experts (dim 0 of every weight), exchanges rows before and after
    `forward`, and passes in `counts` how many rows each local expert received. In bf16 on CUDA devices of compute
    capability 9 and up, each product is one kernel; elsewhere torch loops over the experts.

    Args:
        n_experts: Number of experts (`E`).
        dim: Width of the residual stream (`D`), a multiple of 8.
        ffn_dim: Inner width of one expert (`F`), a multiple of 8: torch's grouped products need rows of a multiple of
            16 bytes.
    """

    def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.up_proj = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)  # as nn.Linear, for each expert

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Transform each row by its expert.

        Args:
            x: `[N, D]`, the rows of expert 0 first, then those of expert 1, and so on.
            counts: Integers `[E]`: number of rows of each expert, with sum `N`. Any of them may be 0.

        Returns:
            `[N, D]`, in the order of `x`.
        """
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = _grouped_linear(x, self.gate_proj, ends), _grouped_linear(x, self.up_proj, ends)  # [N, F]
        out: Tensor = _ContiguousGradient.apply(_grouped_linear(F.silu(gate) * up, self.down_proj, ends))
        return out


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of `x` `[N, I]` up to each of `ends` `[E]` by that expert's `weight` `[E, O, I]`."""
    dtype = autocast_dtype(x)  # autocast does not cast the inputs of grouped products
    return F.grouped_mm(x.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends)


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose backward makes the gradient contiguous: the grouped product's backward requires it.

    The gradient of `sum`, for example, is expanded, not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
