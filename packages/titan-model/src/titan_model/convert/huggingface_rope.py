"""The rotary settings of a `config.json`, in both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters`.

Called by `huggingface_config`; `huggingface_keys` reports the errors that are found here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from titan_model.config import DecoderConfig
from titan_model.convert.errors import shown
from titan_model.convert.huggingface_families import FAMILIES, Family
from titan_model.rope_scalings import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    kind_of,
)

_PARTIAL = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
# What each type of scaling must have, and may have besides. (YaRN ignores `mscale` without `mscale_all_dim`.)
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "default": (),
}
_OPTIONAL = {
    "dynamic": (_ORIGINAL,),
    "yarn": (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (_ORIGINAL,),
    "longrope": (_ORIGINAL, "factor", "attention_factor"),
    "default": (_ORIGINAL,),
}
_ALWAYS = ("rope_type", "type", "rope_theta", _PARTIAL)
_LISTS = {"short_factor", "long_factor"}
_NUMBERS = {key for keys in (*_NEEDED.values(), *_OPTIONAL.values()) for key in keys} - {"truncate"} - _LISTS
_NUMBERS |= {"rope_theta", _PARTIAL}


class RopeSettings(NamedTuple):
    """The rotary settings of a `config.json`, not checked.

    Attributes:
        nested: The contents of `rope_scaling` or `rope_parameters`; empty if there is neither.
        other: The contents of `rope_parameters` if there are both; else the same.
        theta: The base at the top level, or None.
        original_context: `original_max_position_embeddings` at the top level, or None.
        context: `max_position_embeddings`.
        partial: `partial_rotary_factor` at the top level, or None.
        family: What the family has that is not said.
    """

    nested: Mapping[str, Any]
    other: Mapping[str, Any]
    theta: Any
    original_context: Any
    context: Any
    partial: Any
    family: Family

    @property
    def kind(self) -> object:
        """Type of the scaling; `su` is the first name of LongRoPE."""
        kind = self.nested.get("rope_type") or self.nested.get("type") or "default"
        return "longrope" if kind == "su" else kind

    def base(self) -> float:
        """Return the base of the wavelengths."""
        given = (self.nested.get("rope_theta"), self.theta)
        return float(next((theta for theta in given if theta is not None), self.family.rope_theta))

    def fraction(self) -> float:
        """Return the part of each head that is turned."""
        given = (self.nested.get(_PARTIAL), self.partial)
        return float(next((part for part in given if part is not None), 1.0))

    def scaling(self) -> RopeScaling | None:
        """Return the scaling, after `rope_errors` found none."""
        kind, nested = self.kind, self.nested
        original = int(self.original_context or nested.get(_ORIGINAL) or self.context)
        if kind == "default":
            return None
        if kind == "longrope":
            short, long = (tuple(map(float, nested[key])) for key in ("short_factor", "long_factor"))
            factor, attention = nested.get("factor", self.context / original), nested.get("attention_factor")
            return LongRopeScaling(
                short_factor=short,
                long_factor=long,
                original_context=original,
                factor=factor,
                attention_factor=attention,
            )
        factor = nested["factor"]
        if kind != "llama3" and factor == 1 and not _yarn_amplitude(nested):
            return None
        match kind:
            case "linear":
                return LinearScaling(factor=factor)
            case "dynamic":
                return DynamicScaling(factor=factor, original_context=self.context)
            case "yarn":
                given = {key: nested[key] for key in ("beta_fast", "beta_slow", "truncate") if key in nested}
                attention = _yarn_amplitude(nested)
                return YarnScaling(factor=factor, original_context=original, attention_factor=attention, **given)
        return Llama3Scaling(**{key: nested[key] for key in _NEEDED["llama3"]}, original_context=original)

    def max_seq_len(self) -> int:
        """Return the longest sequence: with dynamic scaling `max_position_embeddings` is that of pre-training."""
        scaling = self.scaling()
        longest = extended_context(scaling) if isinstance(scaling, DynamicScaling) else self.context
        return int(longest)


def extended_context(scaling: DynamicScaling) -> int:
    """Return the longest sequence that a dynamic scaling of a `config.json` is for."""
    return int(scaling.factor * scaling.original_context)


def read_rope(values: Mapping[str, Any], kind: str) -> RopeSettings:
    """Collect the rotary settings of a `config.json` of a `model_type`."""
    found = [values.get(key) for key in ("rope_scaling", "rope_parameters")]
    given = [{key: item for key, item in one.items() if item is not None} for one in found if isinstance(one, Mapping)]
    nested = next((one for one in given if one), {})
    return RopeSettings(
        nested=nested,
        other=next((one for one in reversed(given) if one), {}),
        theta=values.get("rope_theta"),
        original_context=FAMILIES[kind].original_context if values.get(_ORIGINAL) is None else values[_ORIGINAL],
        context=values.get("max_position_embeddings"),
        partial=values.get(_PARTIAL),
        family=FAMILIES[kind],
    )


def rope_to_huggingface(config: DecoderConfig, kind: str) -> dict[str, Any]:
    """Return the rotary settings and `max_position_embeddings` of a config.json."""
    scaling, family = config.rope_scaling, FAMILIES[kind]
    values: dict[str, Any] = {
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if family.partial_rotary:
        values[_PARTIAL] = config.rotary_fraction
    if scaling is None:
        return values
    nested = {"rope_type": kind_of(scaling), **vars(scaling)}
    original = nested.pop("original_context", None)
    if isinstance(scaling, DynamicScaling):
        values["max_position_embeddings"] = original
    elif original is not None and family.original_context is None:
        nested[_ORIGINAL] = original
    elif original is not None:
        values[_ORIGINAL] = original
    if isinstance(scaling, LongRopeScaling):
        nested |= {key: list(nested[key]) for key in ("short_factor", "long_factor")}
        if scaling.factor == config.max_seq_len / scaling.original_context:
            del nested["factor"]
        if family.rope_kinds is not None:  # earlier releases accept this name only
            nested["type"] = nested.pop("rope_type")
    values["rope_scaling"] = {key: value for key, value in nested.items() if value is not None}
    return values


def rope_errors(rope: RopeSettings, kind: str) -> list[str]:
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
    mistyped += [
        f"{key} of the rotary settings is {shown(value)}, must be a list of positive numbers"
        for key, value in {**rope.other, **nested}.items()
        if key in _LISTS and not (isinstance(value, list) and all(map(_is_positive, value)))
    ]
    if mistyped:
        return mistyped
    return _contradictions(rope) + _type_errors(rope, kind)


def _type_errors(rope: RopeSettings, model: str) -> list[str]:
    """Return the errors of the settings of a type of scaling."""
    nested, kind = rope.nested, rope.kind
    if nested.get(_PARTIAL, 1) != 1 and not rope.family.partial_rotary:
        return [f"{_PARTIAL} is {nested[_PARTIAL]}, a {model} supports 1 only"]
    kinds = rope.family.rope_kinds or tuple(_NEEDED)
    if not isinstance(kind, str) or kind not in kinds:
        return [f"rope_type is {shown(kind)}, a {model} supports {', '.join(kinds)}"]
    lost = [key for key in _NEEDED[kind] if key not in nested]
    if lost:
        return [f"{key} is missing from the rotary settings" for key in lost]
    read = {*_ALWAYS, *_NEEDED[kind], *_OPTIONAL.get(kind, ())}
    wrong = [
        f"{key} of the rotary settings is {shown(value)}, which is not known for rope_type {shown(kind)}"
        for key, value in nested.items()
        if key not in read and not (key == "factor" and value == 1)
    ]
    if type(nested.get("truncate", True)) is not bool:
        wrong.append(f"truncate of the rotary settings is {shown(nested['truncate'])}, must be true or false")
    original = nested.get(_ORIGINAL, rope.context)
    if kind == "dynamic" and original != rope.context and nested["factor"] != 1:
        wrong.append(
            f"{_ORIGINAL} of the rotary settings is {shown(original)}, but dynamic scaling is relative to "
            f"max_position_embeddings, {shown(rope.context)}: set the latter, and pass max_seq_len when loading"
        )
    if not wrong and _is_positive(rope.context):
        try:
            rope.scaling()
        except ValueError as error:
            wrong.append(f"rotary settings: {error}")
    return wrong


def _contradictions(rope: RopeSettings) -> list[str]:
    """Return an error for each setting that is given twice, with different values."""
    nested = rope.nested
    pairs = [
        ("rope_theta", rope.theta, nested.get("rope_theta")),
        # Without scaling nothing reads it, and a Phi has one by default.
        (_ORIGINAL, None if rope.kind == "default" else rope.original_context, nested.get(_ORIGINAL)),
        (_PARTIAL, rope.partial, nested.get(_PARTIAL)),
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


def _yarn_amplitude(nested: Mapping[str, Any]) -> float | None:
    """Return the attention factor that YaRN's settings give, or None if it is that of the paper."""
    if "attention_factor" in nested:
        return float(nested["attention_factor"])
    if "mscale" not in nested or "mscale_all_dim" not in nested:
        return None
    part, whole = (0.1 * nested[key] * math.log(nested["factor"]) + 1 for key in ("mscale", "mscale_all_dim"))
    return float(part / whole)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
