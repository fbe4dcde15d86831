"""The rotary settings of a `config.json`, in both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters`.

Called by `huggingface_config`; `huggingface_keys` reports the errors that are found here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from titan_model.config import RopeScaling
from titan_model.convert.errors import shown

_DEFAULT_THETA = 10_000.0
# Types that are the unscaled rotation where their factor is 1.
_IDENTITY_AT_1 = {
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"},
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_ORIGINAL = "original_max_position_embeddings"
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_NUMBERS = {*_LLAMA3, "rope_theta", "partial_rotary_factor", _ORIGINAL, "beta_fast", "beta_slow"}


class RopeSettings(NamedTuple):
    """The rotary settings of a `config.json`, not checked.

    Attributes:
        nested: The contents of `rope_scaling` or `rope_parameters`; empty if there is neither.
        other: The contents of `rope_parameters` if there are both; else the same.
        theta: The base at the top level, or None.
        original_context: `original_max_position_embeddings` at the top level, or None.
        context: `max_position_embeddings`.
    """

    nested: Mapping[str, Any]
    other: Mapping[str, Any]
    theta: Any
    original_context: Any
    context: Any

    @property
    def kind(self) -> object:
        """Type of the scaling."""
        return self.nested.get("rope_type") or self.nested.get("type") or "default"

    def base(self) -> float:
        """Return the base of the wavelengths."""
        nested = self.nested.get("rope_theta")
        return float(nested if nested is not None else self.theta if self.theta is not None else _DEFAULT_THETA)

    def scaling(self) -> RopeScaling | None:
        """Return the scaling, after `rope_errors` found none."""
        if self.kind != "llama3":
            return None
        original = self.original_context or self.nested.get(_ORIGINAL) or self.context
        return RopeScaling(**{key: self.nested[key] for key in _LLAMA3}, original_context=original)


def read_rope(values: Mapping[str, Any]) -> RopeSettings:
    """Collect the rotary settings of a `config.json`."""
    found = [values.get(key) for key in ("rope_scaling", "rope_parameters")]
    given = [{key: item for key, item in one.items() if item is not None} for one in found if isinstance(one, Mapping)]
    nested = next((one for one in given if one), {})
    return RopeSettings(
        nested=nested,
        other=next((one for one in reversed(given) if one), {}),
        theta=values.get("rope_theta"),
        original_context=values.get("original_max_position_embeddings"),
        context=values.get("max_position_embeddings"),
    )


def scaling_to_huggingface(scaling: RopeScaling) -> dict[str, Any]:
    """Return the `rope_scaling` of a config.json."""
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def rope_errors(rope: RopeSettings) -> list[str]:
    """Return one message for each rotary setting that is missing, has the wrong type, or is not supported."""
    nested = rope.nested
    by_layer = [key for key, value in nested.items() if isinstance(value, Mapping)]
    if by_layer:
        return [f"the rotary settings differ by layer ({', '.join(by_layer)}), a Decoder has the same in all layers"]
    mistyped = [
        f"{key} of the rotary settings is {shown(value)}, must be a positive number"
        for key, value in {**rope.other, **nested}.items()
        if key in _NUMBERS and not _is_positive(value)
    ]
    if mistyped:
        return mistyped
    return _contradictions(rope) + _type_errors(nested, rope.kind)


def _type_errors(nested: Mapping[str, Any], kind: object) -> list[str]:
    """Return the errors of the settings of a type of scaling."""
    if nested.get("partial_rotary_factor", 1) != 1:
        return [f"partial_rotary_factor is {nested['partial_rotary_factor']}, a Decoder supports 1 only"]
    read = set(_ALWAYS)
    if kind == "llama3":
        lost = [key for key in _LLAMA3 if key not in nested]
        if lost:
            return [f"{key} is missing from the rotary settings" for key in lost]
        read |= {*_LLAMA3, _ORIGINAL}
    elif isinstance(kind, str) and kind in _IDENTITY_AT_1 and nested.get("factor") == 1:
        read |= _IDENTITY_AT_1[kind]
    elif kind == "default":
        read |= {_ORIGINAL} | ({"factor"} if nested.get("factor") == 1 else set())
    else:
        factor = f" with a factor of {nested['factor']}" if "factor" in nested else ""
        return [f"rope_type is {shown(kind)}{factor}, a Decoder supports default and llama3"]
    return [
        f"{key} of the rotary settings is {shown(value)}, which is not known for rope_type {shown(kind)}"
        for key, value in nested.items()
        if key not in read
    ]


def _contradictions(rope: RopeSettings) -> list[str]:
    """Return an error for each setting that is given twice, with different values."""
    nested = rope.nested
    pairs = [
        ("rope_theta", rope.theta, nested.get("rope_theta")),
        (_ORIGINAL, rope.original_context, nested.get(_ORIGINAL)),
        ("the type of the rotary settings", nested.get("rope_type"), nested.get("type")),
    ]
    wrong = [
        f"{name} is given twice, as {shown(first)} and as {shown(second)}: remove one"
        for name, first, second in pairs
        if first is not None and second is not None and first != second
    ]
    if _normalized(rope, nested) != _normalized(rope, rope.other):
        wrong.append("rope_scaling and rope_parameters differ: remove one")
    return wrong


def _normalized(rope: RopeSettings, nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings in one spelling."""
    same = rope._replace(nested=nested)
    return {**nested, "rope_type": same.kind, "type": same.kind, "rope_theta": same.base()}


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
