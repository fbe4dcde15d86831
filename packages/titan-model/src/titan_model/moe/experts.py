"""The experts of a block: many feed-forwards, each over its own rows, in three grouped matrix products."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_model.fused_ops import autocast_dtype


class Experts(nn.Module):
    """SwiGLU feed-forwards side by side, each for the rows that are its own.

    Whoever spreads experts over ranks gives each rank some of them (dim 0 of every weight), exchanges rows before and
    after `forward`, and says in `counts` how many rows each of them has got here. On CUDA the products are one kernel
    each in bf16 on compute capability 9 and up; elsewhere torch goes over the experts itself.

    Args:
        n_experts: How many (`E`).
        dim: Width of the residual stream (`D`), a multiple of 8.
        ffn_dim: Inner width of one expert (`F`), a multiple of 8: torch's grouped products want rows of whole 16 bytes.
    """

    def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.up_proj = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)  # as torch's own linears, expert by expert

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Transform each row by its expert.

        Args:
            x: `[N, D]`, the rows of expert 0 first, then those of expert 1, and so on.
            counts: Integers `[E]`: rows of each expert, `N` in all. Any of them may be 0.

        Returns:
            `[N, D]`, row by row.
        """
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = _grouped_linear(x, self.gate_proj, ends), _grouped_linear(x, self.up_proj, ends)  # [N, F]
        out: Tensor = _ContiguousGradient.apply(_grouped_linear(F.silu(gate) * up, self.down_proj, ends))
        return out


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of `x` `[N, I]` up to each of `ends` `[E]` by that expert's `weight` `[E, O, I]`."""
    dtype = autocast_dtype(x)  # grouped products are not on autocast's list
    return F.grouped_mm(x.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends)


class _ContiguousGradient(torch.autograd.Function):
    """Gives the grouped product's backward the dense gradient that it insists on, as that of `sum` is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
