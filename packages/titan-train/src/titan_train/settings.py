"""A setting's journey: default, then file, then command line, into one frozen `Config`."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from titan_train.config import Config
from titan_train.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """A config and where its values came from.

    Attributes:
        config: The values.
        origins: `section.key` to the file's or flag's name; what is not in it has its default.
        name: What the user calls it: the preset's name, or the file's path.
    """

    config: Config
    origins: Mapping[str, str]
    name: str


def preset_names() -> list[str]:
    """Return the names of the configs that are shipped."""
    folder = resources.files("titan_train") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Settings:
    """Read a config and put the command line's values over the file's.

    Args:
        name: A shipped config's name, or the path of a TOML file.
        overrides: Pairs of `section.key` and the text given for it.

    Returns:
        The validated settings.

    Raises:
        ConfigError: With every mistake: where, what was expected, the nearest valid key.
    """
    where, text = _read(name)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from None
    _read_nones(values)
    origins = {
        f"{section}.{key}": where for section, table in values.items() if isinstance(table, dict) for key in table
    }
    problems = []
    for key, given in overrides:
        field = fields().get(key)
        if field is None:
            problems.append(f"--{key}: unknown setting{_nearest(key, [*fields()], '--')}")
            continue
        section, leaf = key.split(".")
        table = values.setdefault(section, {})
        if isinstance(table, dict):
            table[leaf] = _parse(given, field)
        origins[key] = f"--{key}"
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_explain(item, origins, where) for item in error.errors()]
        raise ConfigError("\n".join(problems)) from None
    if problems:
        raise ConfigError("\n".join(problems))
    run = config.run.model_copy(update={"folder": config.run.folder.replace("{config}", Path(name).stem)})
    return Settings(config.model_copy(update={"run": run}), origins, name)


def fields() -> dict[str, FieldInfo]:
    """Return every setting by `section.key`."""
    return {
        f"{section}.{key}": field for section, table in sections().items() for key, field in table.model_fields.items()
    }


def sections() -> dict[str, type[BaseModel]]:
    """Return every section's class by name."""
    found = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        found[name] = field.annotation
    return found


def type_name(field: FieldInfo) -> str:
    """Return a field's type as a person writes it: `int`, `float or none`, `one of cpu, cuda`."""
    return _type_name(field.annotation)


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """Return a config as TOML that `load` reads back to an equal one; with `origins`, each value says its own."""
    lines: list[str] = []
    settings = fields()
    for section, table in config.model_dump().items():
        lines += ["", f"[{section}]"]
        for key, value in table.items():
            origin = "" if origins is None else f"  # {origins.get(f'{section}.{key}', 'default')}"
            is_default_none = value is None and settings[f"{section}.{key}"].default is None
            lines.append(f"{'# ' if is_default_none else ''}{key} = {shown(value)}{origin}")
    return "\n".join(lines[1:]) + "\n"


def _read(name: str) -> tuple[str, str]:
    if name in preset_names():
        return f"preset {name}", (resources.files("titan_train") / "presets" / f"{name}.toml").read_text("utf-8")
    path = Path(name)
    try:
        return name, path.read_text("utf-8")
    except FileNotFoundError:
        presets = preset_names()
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--config {name}: no such file, nor a preset{hint} (presets: {', '.join(presets)})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {name}: cannot be read: {error}") from None


def _read_nones(values: dict[str, Any]) -> None:
    """Turn "none" into None where a setting may be none: TOML has no word for it."""
    for key, field in fields().items():
        section, leaf = key.split(".")
        table = values.get(section)
        if isinstance(table, dict) and table.get(leaf) == "none" and type(None) in get_args(field.annotation):
            table[leaf] = None


def _parse(text: str, field: FieldInfo) -> object:
    """Give the text of a flag the type that the same value has in a TOML file."""
    is_list, is_table = (get_origin(field.annotation) is kind for kind in (list, dict))
    options = get_args(field.annotation) or (field.annotation,)
    if text == "none" and type(None) in options:
        return None
    if not is_list and not is_table and (str in options or all(isinstance(option, str) for option in options)):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return [value] if is_list and not isinstance(value, list) else value


def _explain(item: Mapping[str, Any], origins: Mapping[str, str], where: str) -> str:
    """Turn one of pydantic's errors into a line that says where, what and what instead."""
    loc = [str(part) for part in item["loc"]]
    key = ".".join(loc[:2])
    origin = origins.get(key, where)
    at = origin if origin == f"--{key}" else f"{origin}: {key}"
    valid = fields()
    if len(loc) > 3:  # in a table of a list of tables
        table = get_args(valid[key].annotation)[0]
        valid, key = table.model_fields, loc[3]
        at = f"{at}, table {int(loc[2]) + 1}: {key}"
    if item["type"] == "extra_forbidden":
        if len(loc) == 1:
            return f"{where}: unknown section [{loc[0]}]{_nearest(loc[0], [*sections()], '')}"
        return f"{at}: unknown setting{_nearest(key, [*valid], '')}"
    if item["type"] == "missing":
        return f"{at} is missing"
    if item["type"] == "value_error":
        table_number = f", table {int(loc[2]) + 1}" if len(loc) == 3 else ""
        return f"{where}: [{key}]{table_number} {item['ctx']['error']}"
    field = valid.get(key)
    if field is None:
        return f"{where}: {key} must be a table of settings ([{key}]), not {item['input']!r}"
    return f"{at} is {item['input']!r}: expected {_type_name(field.annotation)}, {_requirement(item['msg'])}"


def _requirement(message: str) -> str:
    message = message.removeprefix("Input should be ")
    return message[:1].lower() + message[1:]


def _nearest(key: str, valid: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if not near:  # the right key in the wrong section
        leaf = key.rsplit(".", 1)[-1]
        near = [name for name in valid if name.rsplit(".", 1)[-1] == leaf]
    return f"; did you mean {prefix}{near[0]}?" if near else "; `titan-train --help` lists all"


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


def shown(value: object) -> str:
    """Return a value as a config file writes it."""
    if value is None:
        return '"none"'
    if isinstance(value, list):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, Mapping):  # what is none is left out: TOML has no word for it
        inside = ", ".join(f"{json.dumps(key)} = {shown(item)}" for key, item in value.items() if item is not None)
        return "{" + inside + "}"
    # JSON's numbers, booleans and strings are TOML's too, but for 1e-05 (fine) and infinity (never valid here).
    return json.dumps(value, ensure_ascii=False)
