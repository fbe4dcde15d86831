"""The README's table of what works together, made of the cases that the matrix trains.

python packages/titan-parallel/tests/parallel_table.py     writes it into the README
"""

from __future__ import annotations

from pathlib import Path

from parallel_matrix import KINDS, Case, cases

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- what works together: made by tests/parallel_table.py -->\n", "<!-- end of what works together -->\n"


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


def written(text: str) -> str:
    """Return the README's text with the table as of now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
