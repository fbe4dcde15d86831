"""How the rotations of rotary positions are changed to extend the context: one class for each method.

A `DecoderConfig` has one of these or None; `layers.rope` computes the rotations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): every wavelength is multiplied by a factor.

    Attributes:
        factor: Multiplies all wavelengths.
    """

    depends_on_length: ClassVar[bool] = False
    factor: float

    def __post_init__(self) -> None:
        _check("linear", {"factor must be at least 1": self.factor >= 1}, self)


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware scaling that grows with the length: documents within the original context are unchanged.

    For a document of `n` tokens the base is multiplied by `(factor * n / original_context - factor + 1)` to the power
    of `d / (d - 2)`, for a rotation of `d` dims.

    Attributes:
        factor: How fast the base grows.
        original_context: Context length of pre-training, in tokens; longer documents are scaled.
    """

    depends_on_length: ClassVar[bool] = True
    factor: float
    original_context: int

    def changes_after(self, length: int) -> bool:
        """Return whether one token more changes the rotations in a document of `length` tokens."""
        return length >= self.original_context

    def __post_init__(self) -> None:
        _check("dynamic", {**_factor(self.factor), **_context(self.original_context)}, self)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): long wavelengths are multiplied by a factor, short ones are kept.

    Attributes:
        factor: Multiplies the longest wavelengths.
        original_context: Context length of pre-training, in tokens.
        attention_factor: Factor of queries and of keys; None is that of the paper, `0.1 * ln(factor) + 1`.
        beta_fast: Wavelengths that turn this often within the original context, or more often, are unchanged.
        beta_slow: Wavelengths that turn this often or less are multiplied by all of `factor`.
        truncate: Whether the two bounds between are rounded outwards to whole pairs of dims.
    """

    depends_on_length: ClassVar[bool] = False
    factor: float
    original_context: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        rules = {
            **_factor(self.factor),
            **_context(self.original_context),
            "0 < beta_slow < beta_fast": 0 < self.beta_slow < self.beta_fast,
            "attention_factor must be positive": self.attention_factor is None or self.attention_factor > 0,
        }
        _check("yarn", rules, self)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are multiplied by a factor, short ones are kept.

    Wavelengths below `original_context / high_freq_factor` are unchanged, those above
    `original_context / low_freq_factor` are multiplied by `factor`, and those between are interpolated. Source: the
    reference code released with Llama 3.1.

    Attributes:
        factor: Multiplies the longest wavelengths.
        low_freq_factor: Wavelengths above `original_context / low_freq_factor` are scaled by all of `factor`.
        high_freq_factor: Wavelengths below `original_context / high_freq_factor` are unchanged.
        original_context: Context length of pre-training, in tokens.
    """

    depends_on_length: ClassVar[bool] = False
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        order = 0 < self.low_freq_factor < self.high_freq_factor
        rules = {**_factor(self.factor), "0 < low_freq_factor < high_freq_factor": order}
        _check("llama3", {**rules, **_context(self.original_context)}, self)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each wavelength has two factors, for short and long documents.

    Attributes:
        short_factor: Factor of each wavelength in documents within the original context.
        long_factor: Factor of each wavelength in longer documents.
        original_context: Context length of pre-training, in tokens.
        factor: How many times that the context is extended, for the factor of queries and keys.
        attention_factor: Factor of queries and of keys; None is that of the paper,
            `sqrt(1 + ln(factor) / ln(original_context))`.
    """

    depends_on_length: ClassVar[bool] = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_context: int
    factor: float
    attention_factor: float | None = None

    def changes_after(self, length: int) -> bool:
        """Return whether one token more changes the rotations in a document of `length` tokens."""
        return length == self.original_context

    def __post_init__(self) -> None:
        rules = {
            "factor must be positive": self.factor > 0,
            "original_context at least 2": self.original_context >= 2,
            "short_factor and long_factor positive": min((*self.short_factor, *self.long_factor), default=0) > 0,
            "attention_factor must be positive": self.attention_factor is None or self.attention_factor > 0,
        }
        _check("longrope", rules, self)


RopeScaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling | LongRopeScaling

ROPE_SCALINGS: Mapping[str, type[RopeScaling]] = MappingProxyType(
    {
        "linear": LinearScaling,
        "dynamic": DynamicScaling,
        "yarn": YarnScaling,
        "llama3": Llama3Scaling,
        "longrope": LongRopeScaling,
    }
)


def rope_scaling(kind: str, **values: Any) -> RopeScaling:
    """Return the scaling of a kind, given by its name, as config files do.

    Args:
        kind: A key of `ROPE_SCALINGS`, for example `yarn`.
        **values: Its attributes.

    Raises:
        ValueError: If there is no such kind, or a value is missing, not one of this kind, or out of range.

    Example:
        >>> from titan_model import rope_scaling
        >>> rope_scaling("linear", factor=4.0)
        LinearScaling(factor=4.0)
    """
    if kind not in ROPE_SCALINGS:
        raise ValueError(f"rope scaling: the kind is {kind!r}, must be one of {', '.join(ROPE_SCALINGS)}")
    made = ROPE_SCALINGS[kind]
    names = [field.name for field in fields(made)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(f"rope scaling: {', '.join(unknown)} is not a setting of {kind}, which has {', '.join(names)}")
    try:
        return made(**values)
    except TypeError:
        raise ValueError(
            f"rope scaling: {kind} needs {', '.join(name for name in names if _is_needed(made, name))}; "
            f"given are {', '.join(values) or 'none of them'}"
        ) from None


def kind_of(scaling: RopeScaling) -> str:
    """Return the name of a scaling's kind."""
    return next(name for name, made in ROPE_SCALINGS.items() if type(scaling) is made)


def amplitude(scaling: RopeScaling | None) -> float:
    """Return the factor of rotated queries and of rotated keys."""
    if not isinstance(scaling, YarnScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, YarnScaling):
        return 0.1 * math.log(scaling.factor) + 1
    return math.sqrt(1 + math.log(max(scaling.factor, 1.0)) / math.log(scaling.original_context))


def _is_needed(made: type[RopeScaling], name: str) -> bool:
    return not hasattr(made, name)  # a default is an attribute of the class


def _factor(factor: float) -> dict[str, bool]:
    return {"factor must be at least 1": factor >= 1}


def _context(length: int) -> dict[str, bool]:
    return {"original_context at least 1": length >= 1}


def _check(kind: str, rules: Mapping[str, bool], scaling: object) -> None:
    if not all(rules.values()):
        raise ValueError(f"rope scaling {kind}: {', '.join(rules)}; got {scaling}")
