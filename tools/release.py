"""Releases, one package at a time. A tag `titan-data-v0.2.0` releases titan-data 0.2.0.

    python tools/release.py check [TAG]    can the workspace, or the package of this tag, be released?
    python tools/release.py notes TAG      print the section of its changelog for this version

Checked: the tag names a package at its version; its changelog has that version; every bound on a sibling admits the
sibling's version in the workspace (uv itself does not look at these bounds there).
"""

from __future__ import annotations

import re
import sys

from packaging.specifiers import SpecifierSet

from workspace import Package, packages


def problems(package: Package, known: dict[str, Package]) -> list[str]:
    """Return why a package cannot be released as it stands, one sentence each."""
    found = []
    if not notes(package):
        found.append(f"{package.name}: CHANGELOG.md has no text under '## [{package.version}]'")
    for sibling, bounds in package.siblings.items():
        if not bounds:
            found.append(f"{package.name}: requires {sibling} without bounds, so its wheel would take any version")
        elif known[sibling].version not in SpecifierSet(bounds):
            found.append(f"{package.name}: requires {sibling}{bounds}, but it is {known[sibling].version} here")
    return found


def notes(package: Package) -> str:
    """Return what the changelog says of the package's version."""
    text = (package.folder / "CHANGELOG.md").read_text("utf-8")
    match = re.search(rf"^## \[{re.escape(package.version)}\][^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return match[1].strip() if match else ""


def package_of(tag: str, known: dict[str, Package]) -> Package:
    """Return the package that a tag releases.

    Raises:
        ValueError: If the tag is not `PACKAGE-vVERSION` of a package at that version.
    """
    name, _, version = tag.rpartition("-v")
    if name not in known:
        raise ValueError(f"tag {tag!r} does not name a package; use PACKAGE-vVERSION with one of {', '.join(known)}")
    if known[name].version != version:
        raise ValueError(f"tag {tag!r}, but {name} is at {known[name].version} in its pyproject.toml")
    return known[name]


def main() -> int:
    """Run the command named on the command line."""
    known = packages()
    try:
        match sys.argv[1:]:
            case ["check"]:
                found = [problem for package in known.values() for problem in problems(package, known)]
            case ["check", tag]:
                found = problems(package_of(tag, known), known)
            case ["notes", tag]:
                print(notes(package_of(tag, known)))
                return 0
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except ValueError as error:
        found = [str(error)]
    print("\n".join(found) if found else "ready for release")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
