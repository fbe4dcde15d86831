"""Keep the committed `uv.lock` free of index addresses.

People behind a mirror and people on the public index share one lock: versions, file names and hashes. uv writes
addresses into its lock; git's clean filter takes them out on the way into a commit, and uv fills them in again on
first use.

    python tools/lock.py register    name this script as the clean filter of uv.lock in this clone (once)
    python tools/lock.py clean       filter: addressed lock on stdin, neutral lock on stdout
    python tools/lock.py check       fail if the lock in HEAD or in the index is not neutral

Only the standard library, so that it runs before anything is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable

FILTER = "titan-lock"
NEUTRAL_SOURCE = "registry"

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SOURCE = re.compile(r'source = \{ registry = "[^"]*" \}')
_FILE = re.compile(r'\{ (?:url|path) = "(?:[^"]*/)?(?P<name>[^"/]+)"')


def neutralize(lock: str) -> str:
    """Return `lock` with every index address removed.

    Three changes, each of which uv undoes on first use (and the result is then equal to the original lock):
    the registry of each package becomes a fixed word; each file keeps its name alone; the root package's
    `[package.metadata]` is left out, which makes uv resolve once, with the locked versions as preferences.
    """
    return "\n".join(_without_root_metadata(_neutral_line(line) for line in lock.split("\n")))


def _neutral_line(line: str) -> str:
    line = _SOURCE.sub(f'source = {{ registry = "{NEUTRAL_SOURCE}" }}', line)
    return _FILE.sub(r'{ path = "\g<name>"', line)


def _without_root_metadata(lines: Iterable[str]) -> list[str]:
    kept: list[str] = []
    in_root = skipping = False
    for line in lines:
        if line.startswith("[["):
            in_root = skipping = False
        elif line.startswith("["):
            skipping = in_root and line.startswith("[package.metadata")
        elif line == 'source = { virtual = "." }':
            in_root = True
        if not skipping:
            kept.append(line)
    return kept


def violations(lock: str) -> list[str]:
    """Return one line for each place of `lock` that is not in neutral form."""
    found = [f"line {n}: {line.strip()[:100]}" for n, line in enumerate(lock.split("\n"), 1) if _ADDRESS.search(line)]
    if not found and neutralize(lock) != lock:
        found.append("not in neutral form (file paths, registry name or the root package's metadata)")
    return found


def check() -> int:
    """Check the lock as committed (HEAD) and as staged (index); print what is wrong."""
    bad = 0
    for where, revision in (("HEAD", "HEAD:uv.lock"), ("the index", ":uv.lock")):
        shown = subprocess.run(["git", "show", revision], capture_output=True, text=True, check=False)
        if shown.returncode != 0:
            print(f"uv.lock is not in {where}: {shown.stderr.strip()}", file=sys.stderr)
            return 1
        for violation in violations(shown.stdout)[:5]:
            bad += 1
            print(f"uv.lock in {where}, {violation}", file=sys.stderr)
    if bad:
        print("Run `python tools/lock.py register`, then `git add --renormalize uv.lock` and commit.", file=sys.stderr)
        return 1
    print("uv.lock is registry-neutral")
    return 0


def register() -> int:
    """Make git run `clean` on uv.lock whenever it is added, in this clone."""
    for key, value in (("clean", "python3 tools/lock.py clean"), ("smudge", "cat"), ("required", "true")):
        subprocess.run(["git", "config", f"filter.{FILTER}.{key}", value], check=True)
    print("registered: what git stores of uv.lock is now always the neutral form")
    return 0


def clean() -> int:
    """Neutralize stdin to stdout, byte for byte otherwise."""
    sys.stdout.buffer.write(neutralize(sys.stdin.buffer.read().decode()).encode())
    return 0


def main() -> int:
    """Run the command named on the command line."""
    commands = {"register": register, "clean": clean, "check": check}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    return commands[sys.argv[1]]()


if __name__ == "__main__":
    raise SystemExit(main())
