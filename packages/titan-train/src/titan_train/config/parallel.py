"""The section [parallel]: the layout over processes, and how to parallelize.

Its settings are the fields of titan-parallel's `Degrees` and `ParallelOptions`, with their types, defaults and
descriptions: a new option of titan-parallel is a new setting here. Those of its parts `PipelineOptions` and
`Float8Options` are named `pipeline_...` and `float8_...`. `Float8Options` may be absent: its first field is the setting
`float8`, for which "none" means absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import Field as DataclassField
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Final, Self, get_args, get_origin, get_type_hints

from pydantic import Field, create_model, model_validator

from titan_parallel.degrees import Degrees
from titan_parallel.options import ParallelOptions
from titan_train.config.section import Section

# Settings that have another name than the rule gives them, by the option's name.
_RENAMED: Final = {
    "compile_blocks": "compile",
    "pipeline.stages_per_rank": "stages_per_rank",
    "pipeline.first_stage_less": "first_stage_less",
    "pipeline.last_stage_less": "last_stage_less",
    "float8.fsdp_all_gather": "float8_all_gather",
}
_ELSEWHERE: Final = {"param_dtype": "training.dtype"}  # options that another section sets


@dataclass(frozen=True)
class _Option:
    """One setting.

    Attributes:
        name: Name in titan-parallel; `pipeline.split` is the field `split` of the part `pipeline`.
        key: Name in the section.
        annotation: Type in the section: TOML has lists where options have tuples.
        default: Default in the section.
        help: Description.
    """

    name: str
    key: str
    annotation: Any
    default: Any
    help: str


def _options_of(table: Any) -> Iterator[_Option]:
    """Yield the settings that stand for the fields of a dataclass of titan-parallel, those of its parts included."""
    types = get_type_hints(table)
    for field in fields(table):
        part, text = _part(types[field.name]), field.metadata["help"]
        if part is None and field.name not in _ELSEWHERE:
            yield _option(field.name, field.name, field, types[field.name])
        elif part is not None:
            first, *others = fields(part)
            inner = get_type_hints(part)
            if type(None) in get_args(types[field.name]):
                name, annotation = f"{field.name}.{first.name}", inner[first.name] | None
                yield _Option(name, field.name, annotation, None, f"{text} {first.metadata['help']}")
            else:
                others = [first, *others]
            for other in others:
                yield _option(f"{field.name}.{other.name}", f"{field.name}_{other.name}", other, inner[other.name])


def _option(name: str, key: str, field: DataclassField[Any], annotation: Any) -> _Option:
    default: Any = field.default
    if get_origin(annotation) is tuple:
        annotation, default = list[get_args(annotation)[0]], list(default)  # type: ignore[misc]
    return _Option(name, _RENAMED.get(name, key), annotation, default, field.metadata["help"])


def _part(annotation: Any) -> Any:
    """Return the dataclass that an annotation stands for, optional or not; None if it stands for another type."""
    return next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)


_DEGREES: Final = tuple(_options_of(Degrees))
_OPTIONS: Final = tuple(_options_of(ParallelOptions))
_KEYS: Final = {option.name: option.key for option in _OPTIONS if option.name != option.key} | _ELSEWHERE


def with_keys(text: str) -> str:
    """Return a text of titan-parallel with its options named as the section names them."""
    names = "|".join(re.escape(name) for name in sorted(_KEYS, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])({names})(?!\w)", lambda found: _KEYS[found[0]], text)


if TYPE_CHECKING:
    _Settings = Section
else:
    _Settings = create_model(
        "_Settings",
        __base__=Section,
        **{
            option.key: (option.annotation, Field(option.default, description=with_keys(option.help)))
            for option in (*_DEGREES, *_OPTIONS)
        },
    )


class ParallelSection(_Settings):
    """Layout over the processes, whose degrees multiply to their number, and how to parallelize."""

    def degrees(self) -> Degrees:
        """Return the layout.

        Raises:
            LayoutError: If a degree is invalid.
        """
        return Degrees(**{option.name: getattr(self, option.key) for option in _DEGREES})

    def options(self, dtype: str = "float32") -> ParallelOptions:
        """Return the options of `titan_parallel.parallelize`.

        Args:
            dtype: `training.dtype`: dtype of forward and backward.

        Raises:
            LayoutError: If options are invalid or contradict one another.
        """
        values: dict[str, Any] = {"param_dtype": None if dtype == "float32" else dtype}
        parts: dict[str, dict[str, Any]] = {}
        for option in _OPTIONS:
            value = getattr(self, option.key)
            part, _, name = option.name.rpartition(".")
            (parts.setdefault(part, {}) if part else values)[name] = tuple(value) if isinstance(value, list) else value
        types = get_type_hints(ParallelOptions)
        for part, given in parts.items():
            is_absent = getattr(self, part, given) is None  # a setting with the part's own name, such as `float8`
            values[part] = None if is_absent else _part(types[part])(**given)
        return ParallelOptions(**values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.degrees()
            self.options()
        except ValueError as error:
            raise ValueError(with_keys(str(error))) from None
        return self
