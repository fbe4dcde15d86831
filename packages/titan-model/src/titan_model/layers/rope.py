"""Rotary position embeddings (Su et al. 2021, RoFormer), with Llama 3.1's scaling.

Pairs are the two halves of a head (`x[i]` with `x[i + Dh/2]`), the layout of Hugging Face's Llama weights. Meta's
original files pair neighbors instead; `convert.weight_map.InterleavedRotary` permutes the rows of the q and k
projections accordingly.

Shapes: `B` batch, `S` sequence, `H` heads, `Dh` head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titan_model.config import RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """Return the rotation per position of each pair, in radians.

    Args:
        head_dim: Width of one head, even.
        theta: Base of the wavelengths.
        scaling: Llama 3.1's scaling, or None.
        device: Device of the result.

    Returns:
        fp32 `[Dh / 2]`, in decreasing order.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies: Tensor = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 1 where a wavelength is unchanged, 0 where it is multiplied by all of `factor`, linear in the turns between.
    turns = scaling.original_context / wavelengths
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every pair's angle at every position.

    Args:
        positions: Integers `[B, S]` (or `[1, S]` if they are the same in all sequences).
        frequencies: fp32 `[Dh / 2]` from `inverse_frequencies`.

    Returns:
        Two fp32 tensors `[B, S, 1, Dh / 2]`, ready to multiply `[B, S, H, Dh / 2]`.
    """
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()
