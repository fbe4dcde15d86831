"""Rotary position embeddings (Su et al. 2021, RoFormer), with the scalings of `titan_model.rope_scalings`.

Pairs are the two halves of a head (`x[i]` with `x[i + Dh/2]`), the layout of Hugging Face's Llama weights. Meta's
original files pair neighbors instead; `convert.weight_map.InterleavedRotary` permutes the rows of the q and k
projections accordingly.

Shapes: `B` batch, `S` sequence, `H` heads, `Dh` head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titan_model.config import DecoderConfig
from titan_model.rope_scalings import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    amplitude,
)


def make_rope(config: DecoderConfig, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every pair's angle at every position, as a config asks for.

    Args:
        config: The decoder's shape.
        positions: Integers `[B, S]` (or `[1, S]` if they are the same in all sequences).
        lengths: Integers `[B, S]` or `[B, 1]`: tokens of the document that each position belongs to, which some
            scalings depend on; None counts them from the positions.

    Returns:
        Two fp32 tensors `[B, S, 1, Dh / 2]`, ready to multiply `[B, S, H, Dh / 2]`; where only a part of a head is
        turned, `Dh` is that part.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.depends_on_length:
        lengths = document_lengths(positions) if lengths is None else lengths
    frequencies = inverse_frequencies(config.rotary_dim, config.rope_theta, scaling, positions.device, lengths=lengths)
    return rotation(positions, frequencies, amplitude(scaling))


def inverse_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    device: torch.device | None = None,
    *,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return the rotation per position of each pair, in radians.

    Args:
        head_dim: Number of a head's dims that are turned, even.
        theta: Base of the wavelengths.
        scaling: How they are scaled, or None.
        device: Device of the result.
        lengths: Integers `[B, S]`: tokens of each position's document. Only for scalings that depend on it; None is a
            document within the original context.

    Returns:
        fp32 `[Dh / 2]`, in decreasing order; with lengths `[B, S, 1, Dh / 2]` if the scaling depends on them.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    if isinstance(scaling, DynamicScaling) and lengths is not None:
        beyond = scaling.factor * lengths.clamp(min=scaling.original_context).float() / scaling.original_context
        base = theta * (beyond - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))
        return 1.0 / base[..., None, None] ** exponents
    frequencies: Tensor = 1.0 / theta**exponents
    match scaling:
        case LongRopeScaling():
            short, long = (
                frequencies / torch.tensor(factors, dtype=torch.float32, device=device)
                for factors in (scaling.short_factor, scaling.long_factor)
            )
            return short if lengths is None else torch.where(_beyond(lengths, scaling), long, short)
        case LinearScaling():
            return frequencies / scaling.factor
        case YarnScaling():
            keep = _yarn_share(scaling, head_dim, theta, device)
            return keep * frequencies + (1 - keep) * frequencies / scaling.factor
        case Llama3Scaling():
            keep = _llama3_share(scaling, frequencies)
            return keep * frequencies + (1 - keep) * frequencies / scaling.factor
    return frequencies


def _beyond(lengths: Tensor, scaling: LongRopeScaling) -> Tensor:
    return (lengths > scaling.original_context)[..., None, None]


def _llama3_share(scaling: Llama3Scaling, frequencies: Tensor) -> Tensor:
    """Return 1 where a wavelength is unchanged, 0 where it is scaled by all of the factor, linear in turns between."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return keep.clamp(0.0, 1.0)


def _yarn_share(scaling: YarnScaling, head_dim: int, theta: float, device: torch.device | None) -> Tensor:
    """Return 1 where a wavelength is unchanged, 0 where it is scaled by all of the factor, linear in pairs between."""

    def pair(turns: float) -> float:
        """Return the pair, fractional, that turns so often within the original context."""
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - low) / (high - low)).clamp(0.0, 1.0)


def rotation(positions: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every pair's angle at every position.

    Args:
        positions: Integers `[B, S]` (or `[1, S]` if they are the same in all sequences).
        frequencies: fp32 from `inverse_frequencies`.
        amplitude: Factor of both.

    Returns:
        Two fp32 tensors `[B, S, 1, Dh / 2]`, ready to multiply `[B, S, H, Dh / 2]`.
    """
    angles = positions[..., None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if amplitude == 1 else (cos * amplitude, sin * amplitude)


def document_lengths(positions: Tensor) -> Tensor:
    """Return for each token the number of tokens of its document: `[B, S]` to the same shape.

    A document is a run of positions that count up.
    """
    length = positions.shape[1]
    last = torch.ones_like(positions, dtype=torch.bool)
    last[:, :-1] = positions[:, 1:] != positions[:, :-1] + 1
    places = torch.where(last, torch.arange(length, device=positions.device), length)
    ends = places.flip(1).cummin(1).values.flip(1)  # where each token's document ends
    return positions.gather(1, ends) + 1
