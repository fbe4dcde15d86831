"""The workspace's packages and how they depend on one another, for the other tools."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """A package of the workspace.

    Attributes:
        name: Distribution name.
        version: As its pyproject.toml states it.
        siblings: Other packages of the workspace that it requires, each with the version bounds as written.
        folder: Its directory.
    """

    name: str
    version: str
    siblings: dict[str, str]
    folder: Path


def packages(root: Path = ROOT) -> dict[str, Package]:
    """Read every package of the workspace, by name."""
    found = {}
    for file in sorted((root / "packages").glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        siblings = {}
        for requirement in project["dependencies"]:
            match = re.fullmatch(r"(titan-\w+)(\[[^]]*\])?\s*(.*)", requirement)
            if match:
                siblings[match[1]] = match[3]
        found[project["name"]] = Package(project["name"], project["version"], siblings, file.parent)
    return found


def leaves(root: Path = ROOT) -> list[str]:
    """Return the packages that need no other of the workspace."""
    return [package.name for package in packages(root).values() if not package.siblings]
