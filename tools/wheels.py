"""Build the workspace's packages, each once: what is built is kept in build/wheels until the package's files change."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from workspace import ROOT, Package

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "src")


@dataclass(frozen=True)
class Built:
    """The distributions of one package.

    Attributes:
        wheel: What pip installs.
        sdist: The sources it was built from.
    """

    wheel: Path
    sdist: Path


def build(package: Package) -> Built:
    """Build a package's sdist and, from that, its wheel; take them from build/wheels if nothing has changed since."""
    folder = ROOT / "build" / "wheels" / package.name / _digest(package.folder)
    if not list(folder.glob("*.whl")):
        command = ["uv", "build", "--quiet", "--package", package.name, "--out-dir", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return Built(wheel, sdist)


def _digest(folder: Path) -> str:
    """Hash names and contents of all files that a build reads."""
    digest = hashlib.sha256()
    for start in BUILT_FROM:
        top = folder / start
        for file in sorted([top] if top.is_file() else top.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(folder)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
