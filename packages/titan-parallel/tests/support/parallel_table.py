"""The README's tables: what works together, from the cases that the matrix trains, and options, from their fields.

python packages/titan-parallel/tests/support/parallel_table.py     writes them into the README
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

from parallel_matrix import KINDS, Case, cases
from titan_parallel import Degrees, Float8Options, ParallelOptions, PipelineOptions

README = Path(__file__).parents[2] / "README.md"
OPTIONS = (Degrees, ParallelOptions, Float8Options, PipelineOptions)


def table() -> str:
    """Return the table, and below it what is not a pair."""
    found = list(cases())
    kinds = list(KINDS)
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for first in kinds:
        cells = [_cell(found, {first, second}) for second in kinds]
        lines.append(f"| {first} | " + " | ".join(cells) + " |")
    products = sorted({" x ".join(case.kinds) for case in found if len(case.kinds) > 2})
    schedules = list(dict.fromkeys(case.options.pipeline.schedule for case in found if case.degrees.pp > 1))
    contexts = list(dict.fromkeys(case.options.context for case in found if case.degrees.cp > 1))
    modes = {
        "activation checkpointing": [c for c in found if c.options.activation_checkpointing != "none"],
        "compiled blocks": [c for c in found if c.options.compile_blocks],
        "accumulation": [c for c in found if c.microbatches > 1 and c.degrees.pp == 1],
        "tied weights": [c for c in found if c.shape.tied],
        "a mixture of experts": [c for c in found if c.shape.moe],
    }
    lines += ["", f"Of three: {', '.join(products)}. Pipelines: {', '.join(schedules)}. CP: {', '.join(contexts)}."]
    for mode, some in modes.items():
        layouts = list(dict.fromkeys(" x ".join(case.kinds) for case in some))
        lines.append(f"With {mode}: {', '.join(layouts)}.")
    return "\n".join(lines) + "\n"


def _cell(found: list[Case], kinds: set[str]) -> str:
    return "yes" if any(set(case.kinds) == kinds for case in found) else ""


def options_table(kind: type) -> str:
    """Return the table of a class of options: name, default and description of each field."""
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for one in fields(kind):
        if is_dataclass(one.default):
            lines.append(f"| `{one.name}` | `{type(one.default).__name__}()` | {one.metadata['help']} |")
            continue
        default = json.dumps(one.default) if isinstance(one.default, str) else repr(one.default)
        shown = default if one.default in (None, True, False, ()) or isinstance(one.default, int) else f"`{default}`"
        lines.append(f"| `{one.name}` | {shown} | {one.metadata['help']} |")
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """Return the README's text with the tables as of now."""
    tables = {"what works together": table()}
    tables |= {kind.__name__: options_table(kind) for kind in OPTIONS}
    for name, content in tables.items():
        begin, end = f"<!-- {name}: made by tests/support/parallel_table.py -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + "\n" + content + "\n" + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
