"""Which packages a change touches, for CI: `python tools/changed.py BASE` prints a JSON list.

A package is touched by its own files, by those of a package it depends on, and by what all share (the lock, the root
settings, the tools, CI itself).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping

from workspace import ROOT, packages

SHARED = ("pyproject.toml", "uv.lock", "tools/", ".ci/", ".github/")


def touched(files: Iterable[str], siblings: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the packages to test.

    Args:
        files: Changed paths, relative to the root.
        siblings: Each package's dependencies within the workspace.
    """
    files = list(files)
    if any(file.startswith(SHARED) for file in files):
        return list(siblings)
    own = {name for name in siblings if any(file.startswith(f"packages/{name}/") for file in files)}
    return [name for name in siblings if name in own or own & set(siblings[name])]


def main() -> int:
    """Print the packages that differ from a git revision."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    command = ["git", "diff", "--name-only", f"{sys.argv[1]}...HEAD"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    print(json.dumps(touched(shown.splitlines(), {p.name: list(p.siblings) for p in packages().values()})))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
