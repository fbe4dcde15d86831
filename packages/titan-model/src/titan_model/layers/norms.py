"""The norms that a config can name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_model.config import DecoderConfig
from titan_model.fused_ops import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm; see `titan_model.fused_ops.rms_norm`.

    Args:
        dim: Width of the normalized dim.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim of `x` `[..., dim]`."""
        return rms_norm(x, self.weight, self.eps)


def make_norm(config: DecoderConfig) -> nn.Module:
    """Return a norm over the residual stream, of the kind that `config.norm` names."""
    dim, eps = config.dim, config.norm_eps
    match config.norm:
        case "rmsnorm":
            return RMSNorm(dim, eps)
        case "fused_rmsnorm":
            return nn.RMSNorm(dim, eps)
        case "layernorm":
            return nn.LayerNorm(dim, eps)
        case "np_layernorm":
            return nn.LayerNorm(dim, eps, elementwise_affine=False)


def make_head_norm(config: DecoderConfig) -> nn.Module:
    """Return an RMSNorm over one head's queries or keys (Qwen3), fused if `config.norm` is."""
    dim, eps = config.attention_head_dim, config.norm_eps
    return nn.RMSNorm(dim, eps) if config.norm == "fused_rmsnorm" else RMSNorm(dim, eps)
