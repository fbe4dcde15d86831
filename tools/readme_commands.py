"""Run the commands that README.md gives, exactly as written there.

    python tools/readme_commands.py          run them all from the root, stop at the first that fails
    python tools/readme_commands.py --list   print them

A command is a line that begins with `$ ` in a ```console block.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

from workspace import ROOT


def commands(readme: str) -> list[str]:
    """Return the commands of a README's console blocks, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").split("  #")[0].rstrip() for line in lines]


def main() -> int:
    """Run or list them."""
    found = commands((ROOT / "README.md").read_text("utf-8"))
    if sys.argv[1:] == ["--list"]:
        print("\n".join(found))
        return 0
    for command in found:
        print(f"$ {command}", flush=True)
        started = time.monotonic()
        code = subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode
        print(f"[{time.monotonic() - started:.1f} s, exit code {code}]", flush=True)
        if code != 0:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
