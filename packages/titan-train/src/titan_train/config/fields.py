"""A list of all settings with their text, type and default, for `--help`, for flags and for messages.

It is read off the sections' classes. The settings of a source, of which each kind has its own, are listed once each,
with the text of every kind that has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from titan_train.config import Config
from titan_train.config.section import Section
from titan_train.config.sources import SOURCES, SourceTable


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        help: What it sets.
        annotation: Its type.
        default: Its default; None also where there is none.
        required: Whether a value must be given, by some kind of source at least.
    """

    help: str
    annotation: Any
    default: object
    required: bool = False

    @property
    def type_name(self) -> str:
        """The type as a person writes it: `int`, `float or none`, `one of cpu, cuda`."""
        return _type_name(self.annotation)

    @property
    def may_be_none(self) -> bool:
        """Whether "none" stands for no value."""
        return type(None) in get_args(self.annotation)


def sections() -> dict[str, type[Section]]:
    """Return every section's class by name."""
    found: dict[str, type[Section]] = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        found[name] = field.annotation
    return found


def all_settings() -> dict[str, Setting]:
    """Return every setting by `section.key`."""
    return {
        f"{name}.{key}": setting for name, table in sections().items() for key, setting in settings_of(table).items()
    }


def settings_of(table: type[Section]) -> dict[str, Setting]:
    """Return the settings of a table by key, in the order of `--help`."""
    own = {key: _setting(field) for key, field in table.model_fields.items()}
    if not issubclass(table, SourceTable):
        return own
    del own["source"]
    return {**_source_settings(), **own}


def tables_of(setting: Setting) -> dict[str, Setting]:
    """Return what may stand in each table of a setting that is a list of tables; nothing for other settings."""
    for option in get_args(setting.annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return settings_of(option)
    return {}


def _setting(field: FieldInfo) -> Setting:
    # Ranges such as `ge=1`, which pydantic takes off the outermost type, do not matter here.
    required = field.is_required()
    return Setting(
        field.description or "",
        field.annotation,
        None if required else field.get_default(call_default_factory=True),
        required,
    )


def _source_settings() -> dict[str, Setting]:
    kinds = ", ".join(f"{kind} ({_summary(table)})" for kind, table in SOURCES.items())
    found = {"source": Setting(f"Kind of text source: {kinds}.", Literal[tuple(SOURCES)], "stdlib")}
    keys = {key: None for table in SOURCES.values() for key in table.model_fields if key != "source"}
    for key in keys:
        by_kind = {
            kind: _setting(table.model_fields[key]) for kind, table in SOURCES.items() if key in table.model_fields
        }
        found[key] = Setting(
            _help_by_kind(by_kind),
            next(iter(by_kind.values())).annotation,
            next(iter(by_kind.values())).default,
            any(setting.required for setting in by_kind.values()),
        )
    return found


def _summary(table: type[BaseModel]) -> str:
    text = (table.__doc__ or "").splitlines()[0].partition(":")[0].rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _help_by_kind(by_kind: dict[str, Setting]) -> str:
    """Join the texts of all kinds of source that have a setting, each with the kinds it is for."""
    if len(by_kind) == len(SOURCES):
        return next(iter(by_kind.values())).help
    kinds: dict[str, list[str]] = {}
    for kind, setting in by_kind.items():
        kinds.setdefault(setting.help, []).append(kind)
    return " ".join(f"For {' and '.join(names)}: {text}" for text, names in kinds.items())


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "tables"
    if isinstance(annotation, type) and not get_args(annotation):
        return {"str": "text", "bool": "true or false"}.get(annotation.__name__, annotation.__name__)
    options = get_args(annotation)
    if get_origin(annotation) is list:
        return f"list of {_type_name(options[0])}"
    if get_origin(annotation) is dict:
        return f"table of {_type_name(options[1])}"
    if all(isinstance(option, str) for option in options):
        return f"one of {', '.join(options)}"
    if hasattr(annotation, "__metadata__"):
        return _type_name(options[0])
    return " or ".join(_type_name(option) for option in options)
