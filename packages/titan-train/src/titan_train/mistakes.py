"""From pydantic's errors to one line each that says where, what is wrong, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from titan_train.config.fields import all_settings, sections, tables_of
from titan_train.config.sources import SOURCES, kinds_with


def explain(item: Mapping[str, Any], origins: Mapping[str, str], where: str) -> str:
    """Turn one of pydantic's errors into a line.

    Args:
        item: The error.
        origins: `section.key` to the file's or flag's name.
        where: The file's name.
    """
    loc, kind = _without_kind([str(part) for part in item["loc"]])
    section, key = loc[0], ".".join(loc[:2])
    origin = origins.get(key, where)
    at = origin if origin == f"--{key}" else f"{origin}: {key}"
    valid, table = all_settings(), f"[{section}]"
    if len(loc) > 2 and (inside := tables_of(valid[key])):
        valid, table = inside, f"[{key}], table {int(loc[2]) + 1}"
        if len(loc) > 3:
            at, key = f"{at}, table {int(loc[2]) + 1}: {loc[3]}", loc[3]
    # Settings that do not fit together may come from the file and from flags: then it is no mistake of the file alone.
    of_table = table if any(name.startswith(f"--{section}.") for name in origins.values()) else f"{where}: {table}"
    match item["type"]:
        case "extra_forbidden" if len(loc) == 1:
            return f"{where}: unknown section [{section}]{nearest(section, [*sections()])}"
        case "extra_forbidden" if kind and (others := kinds_with(loc[-1])):
            return f'{at}: not a setting of source "{kind}", but of {_quoted(others)}: remove it, or change the source'
        case "extra_forbidden":
            return f"{at}: unknown setting{nearest(key, [*valid])}"
        case "missing" | "too_short" | "string_too_short" if kind and item["input"] is not None:
            needed = SOURCES[kind].model_fields[loc[-1]].description or ""
            return f'{of_table}: source "{kind}" needs {loc[-1]}: {needed[:1].lower()}{needed[1:].rstrip(".")}'
        case "missing":
            return f"{at} is missing"
        case "value_error":
            return f"{of_table} {item['ctx']['error']}"
        case "literal_error" if key in valid:
            return f"{at} is {item['input']!r}: expected {valid[key].type_name}"
        case "union_tag_invalid":
            return f"{at} is {item['input']['source']!r}: expected {valid[key].type_name}"
    setting = valid.get(key)
    if setting is None:
        return f"{where}: {table} must be a table of settings, not {item['input']!r}"
    return f"{at} is {item['input']!r}: expected {setting.type_name}, {_requirement(item['msg'])}"


def nearest(key: str, valid: Sequence[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown `key`: the valid one that is most like it."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if not near:  # the right key in the wrong section
        leaf = key.rsplit(".", 1)[-1]
        near = [name for name in valid if name.rsplit(".", 1)[-1] == leaf]
    return f"; did you mean {prefix}{near[0]}?" if near else "; `titan-train --help` lists all"


def _without_kind(loc: list[str]) -> tuple[list[str], str | None]:
    """Take out of an error's place the object in which a source's keys are collected; return the source's kind."""
    for number, (part, kind) in enumerate(pairwise(loc)):
        if part == "source" and kind in SOURCES:
            return loc[:number] + loc[number + 2 :], kind
    return loc, None


def _quoted(kinds: Sequence[str]) -> str:
    return " and ".join(f'"{kind}"' for kind in kinds)


def _requirement(message: str) -> str:
    message = message.removeprefix("Input should be ")
    return message[:1].lower() + message[1:]
