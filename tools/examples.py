"""The programs that READMEs show, as files in examples/.

    uv run python tools/examples.py check    does examples/ hold what the READMEs show?
    uv run python tools/examples.py write    write it anew from the READMEs

The README is where an example is edited. Its blocks build on one another, so they become one program, `tour.py`, in
which the commands of a shell block are run too; but each block of titan-parallel's README is a program of its own for
torchrun, and a README with a single block has a single program. A program is named by the heading that it stands under.
A TOML block is a file named by its first line.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from workspace import ROOT, packages

FOLDER = ROOT / "examples"
PROGRAMS_OF_THEIR_OWN = ("titan-parallel",)

_PART = re.compile(r"^(?:#+ (?P<heading>[^\n]+)|```(?P<language>\w+)\n(?P<text>.*?)^```)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code in a README.

    Attributes:
        heading: The nearest heading above it.
        language: What the README says it is written in.
        text: The code, with the newline at its end.
    """

    heading: str
    language: str
    text: str


def blocks(readme: str) -> list[Block]:
    """Return the blocks of code of a README, in order."""
    found, heading = [], ""
    for part in _PART.finditer(readme):
        if part["heading"]:
            heading = part["heading"]
        else:
            found.append(Block(heading, part["language"], part["text"]))
    return found


def examples(package: str, readme: str) -> dict[str, str]:
    """Return the files that a package's README makes: path within examples/ to content."""
    found = blocks(readme)
    files = {
        f"{package}/{block.text.splitlines()[0].removeprefix('# ')}": block.text
        for block in found
        if block.language == "toml" and re.match(r"# \S+\.toml\n", block.text)
    }
    python = [block for block in found if block.language == "python"]
    origin = f"# From packages/{package}/README.md; written by tools/examples.py.\n"
    if package in PROGRAMS_OF_THEIR_OWN or len(python) == 1:
        return files | {f"{package}/{_file_name(block.heading)}.py": f"{origin}\n{block.text}" for block in python}
    parts = []
    for block in found:
        commands = _commands(package, block)
        code = block.text if block.language == "python" else "".join(commands)
        if code:
            parts.append(f"# {block.heading}\n\n{code}")
    imports = "\nimport shlex\nimport subprocess\n" if any(_commands(package, block) for block in found) else ""
    return files | ({f"{package}/tour.py": "\n".join([origin + imports, *parts])} if parts else {})


def all_examples() -> dict[str, str]:
    """Return the files that all READMEs make: path within examples/ to content."""
    found: dict[str, str] = {}
    for package in packages().values():
        found |= examples(package.name, (package.folder / "README.md").read_text("utf-8"))
    return found


def problems() -> list[str]:
    """Return how examples/ differs from what the READMEs show, one line for each file."""
    wanted = all_examples()
    there = {str(file.relative_to(FOLDER)): file.read_text("utf-8") for file in FOLDER.glob("titan-*/*")}
    return [
        f"examples/{name}: {'missing' if name not in there else 'not in a README' if name not in wanted else 'differs'}"
        for name in sorted(wanted.keys() | there.keys())
        if wanted.get(name) != there.get(name)
    ]


def write() -> None:
    """Make examples/ hold what the READMEs show."""
    for file in FOLDER.glob("titan-*/*"):
        file.unlink()
    for name, text in all_examples().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(text, "utf-8")


def _commands(package: str, block: Block) -> list[str]:
    """Return a shell block's calls of the package's own program as lines of Python."""
    if block.language not in ("sh", "console"):
        return []
    lines = [line.removeprefix("$ ") for line in block.text.splitlines()]
    return [f"subprocess.run(shlex.split({line!r}), check=True)\n" for line in lines if line.startswith(f"{package} ")]


def _file_name(heading: str) -> str:
    words = re.findall(r"\w+", heading.split(",")[0].lower())
    return "_".join(words)


def main() -> int:
    """Run the command named on the command line."""
    match sys.argv[1:]:
        case ["write"]:
            write()
        case ["check"]:
            pass
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    found = problems()
    print("\n".join([*found, "run: uv run python tools/examples.py write"]) if found else "examples: as in the READMEs")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
