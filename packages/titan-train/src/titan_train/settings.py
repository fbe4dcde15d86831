"""Default, then file, then command line, into one frozen `Config`; and a `Config` as TOML again."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from titan_train.config import Config
from titan_train.config.fields import Setting, all_settings
from titan_train.config.sources import replace_kind
from titan_train.errors import ConfigError
from titan_train.mistakes import explain, nearest


@dataclass(frozen=True)
class Settings:
    """A config and where its values came from.

    Attributes:
        config: The values.
        origins: `section.key` to the name of the file or flag that set it; keys that are not in it have their default.
        name: The preset's name or the file's path, as the user gave it.
    """

    config: Config
    origins: Mapping[str, str]
    name: str


def config_names() -> list[str]:
    """Return the names of the configs that come with titan-train."""
    folder = resources.files("titan_train") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Settings:
    """Read a config file and put the command line's values over the file's.

    Args:
        name: A preset's name, or the path of a TOML file.
        overrides: Pairs of `section.key` and the text given for it.

    Returns:
        The validated settings.

    Raises:
        ConfigError: If there is any mistake; the message lists them all, with the place, what was expected and the
            nearest valid key.

    Example:
        >>> from titan_train import load
        >>> settings = load("debug", [("training.steps", "20")])
        >>> settings.config.training.steps, settings.origins["training.steps"]
        (20, '--training.steps')
    """
    where, values = _read(name)
    origins = {
        f"{section}.{key}": where for section, table in values.items() if isinstance(table, dict) for key in table
    }
    problems = _override(values, origins, overrides)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [explain(item, origins, where) for item in error.errors()]
        raise ConfigError("\n".join(problems)) from None
    if problems:
        raise ConfigError("\n".join(problems))
    run = config.run.model_copy(update={"folder": config.run.folder.replace("{config}", Path(name).stem)})
    return Settings(config.model_copy(update={"run": run}), origins, name)


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """Return a config as TOML that `load` reads back to an equal one.

    Args:
        config: The config.
        origins: If given, a comment behind each value says where it came from.
    """
    lines: list[str] = []
    settings = all_settings()
    for section, table in config.model_dump().items():
        lines += ["", f"[{section}]"]
        for key, value in table.items():
            origin = "" if origins is None else f"  # {origins.get(f'{section}.{key}', 'default')}"
            is_default_none = value is None and settings[f"{section}.{key}"].default is None
            lines.append(f"{'# ' if is_default_none else ''}{key} = {shown(value)}{origin}")
    return "\n".join(lines[1:]) + "\n"


def shown(value: object) -> str:
    """Return a value as a config file writes it."""
    if value is None:
        return '"none"'
    if isinstance(value, list):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, Mapping):  # None is left out: TOML has no word for it
        inside = ", ".join(f"{json.dumps(key)} = {shown(item)}" for key, item in value.items() if item is not None)
        return "{" + inside + "}"
    # JSON's numbers, booleans and strings are valid TOML; 1e-05 is too, and infinity is never a valid setting.
    return json.dumps(value, ensure_ascii=False)


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """Return what messages call the file, and its values."""
    where, text = _read_text(name)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from None
    _read_nones(values)
    return where, values


def _read_text(name: str) -> tuple[str, str]:
    if name in config_names():
        return f"preset {name}", (resources.files("titan_train") / "presets" / f"{name}.toml").read_text("utf-8")
    try:
        return name, Path(name).read_text("utf-8")
    except FileNotFoundError:
        presets = config_names()
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--config {name}: no such file, nor a preset{hint} (presets: {', '.join(presets)})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {name}: cannot read the file: {error}") from None


def _read_nones(values: dict[str, Any]) -> None:
    """Turn "none" into None where a setting may be None: TOML has no word for it."""
    for key, setting in all_settings().items():
        section, leaf = key.split(".")
        table = values.get(section)
        if isinstance(table, dict) and table.get(leaf) == "none" and setting.may_be_none:
            table[leaf] = None


def _override(values: dict[str, Any], origins: dict[str, str], overrides: Sequence[tuple[str, str]]) -> list[str]:
    """Put the command line's values over those of the file, in place; return what is wrong with the flags' names."""
    problems = []
    settings = all_settings()
    given = dict(overrides)
    data = values.setdefault("data", {})
    if isinstance(data, dict) and given.get("data.source", data.get("source")) != data.get("source"):
        # `--data.source stdlib` over a file's dataset: the dataset's own settings go with it.
        for key in replace_kind(data, given["data.source"]):
            origins.pop(f"data.{key}", None)
    for key, text in given.items():
        setting = settings.get(key)
        if setting is None:
            problems.append(f"--{key}: unknown setting{nearest(key, [*settings], '--')}")
            continue
        section, leaf = key.split(".")
        table = values.setdefault(section, {})
        if isinstance(table, dict):
            table[leaf] = _parse(text, setting)
        origins[key] = f"--{key}"
    return problems


def _parse(text: str, setting: Setting) -> object:
    """Give the text of a flag the type that the same value has in a TOML file."""
    is_list, is_table = (get_origin(setting.annotation) is kind for kind in (list, dict))
    options = get_args(setting.annotation) or (setting.annotation,)
    if text == "none" and setting.may_be_none:
        return None
    if not is_list and not is_table and (str in options or all(isinstance(option, str) for option in options)):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return [value] if is_list and not isinstance(value, list) else value
