"""What a change touches, for CI: `python tools/changed.py BASE` prints one line per answer, for GitHub's outputs.

    packages=["titan-data", "titan-train"]   whose tests to run, as a JSON list
    docs=true                                does the documentation have to be built?
    commands=true                            do the root README's commands have to be run?

A package is touched by its own files, by the sources of a package it depends on, by the examples that its README
shows, and by what all packages share (the lock, the root settings, the tools, CI itself). A file that this script
does not know touches everything, and so does a base that git cannot compare with: the zeros of a first push, or a
commit that is not in the clone because a branch was renamed or rewritten.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace import ROOT, packages

DOCUMENTS = ("docs/", "README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "mkdocs.yml")
NO_EFFECT = (
    ".editorconfig",
    ".github/ISSUE_TEMPLATE/",
    ".github/dependabot.yml",
    ".github/pull_request_template.md",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "justfile",
)


@dataclass(frozen=True)
class Touched:
    """What has to be tested.

    Attributes:
        packages: Names of packages, in the workspace's order.
        docs: Whether to build the documentation.
        commands: Whether to run the root README's commands.
    """

    packages: tuple[str, ...]
    docs: bool
    commands: bool


def touched(files: Iterable[str], siblings: Mapping[str, Iterable[str]]) -> Touched:
    """Sort changed files by what they touch.

    Args:
        files: Changed paths, relative to the root.
        siblings: Each package's dependencies within the workspace.

    Returns:
        What to test: everything, if any of the files is shared or unknown.
    """
    tested: set[str] = set()
    sources: set[str] = set()
    docs = commands = False
    for file in files:
        if file.startswith(NO_EFFECT):
            continue
        if file.startswith(DOCUMENTS):
            docs = True
            commands |= file == "README.md"
            continue
        folder, _, path = file.partition("/")
        name, _, path = path.partition("/")
        if folder not in ("packages", "examples") or name not in siblings:
            return everything(siblings)
        docs = True  # the reference is made of docstrings, the guides of READMEs and examples
        tested.add(name)
        if folder == "packages" and not path.startswith("tests/") and not path.endswith(".md"):
            sources.add(name)
    chosen = tuple(name for name in siblings if name in tested or sources & set(siblings[name]))
    return Touched(chosen, docs, commands or bool(chosen))


def everything(siblings: Mapping[str, Iterable[str]]) -> Touched:
    """Return what a change touches that may touch anything."""
    return Touched(tuple(siblings), docs=True, commands=True)


def changed_files(base: str, root: Path = ROOT) -> list[str] | None:
    """List the files that differ from the commit where HEAD left `base`; a renamed file under both of its names.

    Returns:
        Paths relative to the root, or None if git cannot compare the two.
    """
    if not base:  # git would compare HEAD with itself
        print("no base is given, so everything is tested", file=sys.stderr)
        return None
    command = ["git", "diff", "--name-only", "--no-renames", f"{base}...HEAD"]
    shown = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
    if shown.returncode != 0:
        print(f"cannot compare with {base!r}, so everything is tested: {shown.stderr.strip()}", file=sys.stderr)
        return None
    return shown.stdout.splitlines()


def answers(found: Touched) -> str:
    """Write what is touched as lines of GitHub's output file."""
    flags = {"docs": found.docs, "commands": found.commands}
    return "\n".join([f"packages={json.dumps(found.packages)}", *(f"{k}={str(v).lower()}" for k, v in flags.items())])


def main() -> int:
    """Print what differs from a git revision."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    siblings = {package.name: list(package.siblings) for package in packages().values()}
    files = changed_files(sys.argv[1])
    print(answers(everything(siblings) if files is None else touched(files, siblings)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
