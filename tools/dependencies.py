"""Check with deptry that each package declares exactly the libraries it imports: `uv run python tools/dependencies.py`.

An undeclared import works in the shared environment of the workspace and fails where only one package is installed.
What a package needs without importing it is listed, with the reason, under `[tool.deptry]` in its pyproject.toml.
"""

from __future__ import annotations

import subprocess
import sys

from workspace import packages


def main() -> int:
    """Run deptry over every package and print what it finds."""
    failed = []
    for package in packages().values():
        module = package.name.replace("-", "_")
        command = [sys.executable, "-m", "deptry", "src", "--known-first-party", module, "--no-ansi"]
        done = subprocess.run(command, cwd=package.folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            failed.append(package.name)
            print(f"{package.name}:\n{done.stderr}")
    print(f"dependencies: {', '.join(failed)} failed" if failed else "dependencies: every import is declared")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
