"""The dense feed-forward of a block, also the shared expert of a mixture."""

from __future__ import annotations

from torch import Tensor, nn

from titan_model.fused_ops import swiglu


class FeedForward(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202).

    Args:
        dim: Width of the residual stream (`D`).
        ffn_dim: Inner width.
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position independently: `[..., D]` to `[..., D]`."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out
