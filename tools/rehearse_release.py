"""Rehearse a release on this machine: `uv run python tools/rehearse_release.py`.

The five wheels and sdists are built, checked by twine, and served by an index on localhost. In an empty environment
titan-parallel is installed from that index, alone, and its README's first example runs. Then titan-train is installed
and prints its help and a resolved config. Other libraries come from this machine's usual index, in the lock's versions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wheels import build
from workspace import ROOT, packages

RANKS = 2  # of the README's example

# What would lead back to the sources; and the ban on bytecode, as every process would compile all of torch's Python.
_NOT_PASSED_ON = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")


def main() -> int:
    """Rehearse; stop at the first step that fails."""
    with tempfile.TemporaryDirectory(prefix="titan-release-") as scratch:
        folder = Path(scratch)
        dist, python = folder / "dist", folder / "venv" / "bin" / "python"
        _timed("build", lambda: _build(dist))
        _timed(
            "twine check", lambda: _run(sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir()))
        )
        with _index(dist) as address:
            _timed("titan-parallel, installed alone", lambda: _install(address, python, "titan-parallel"))
            _only(python, "titan-parallel")
            _timed("its README's first example", lambda: _first_example(python, folder))
            _timed("titan-train, installed", lambda: _install(address, python, "titan-train"))
        titan_train = str(python.parent / "titan-train")
        _timed("titan-train --help", lambda: _run(titan_train, "--help"))
        _timed("titan-train --print-config", lambda: _run(titan_train, "--config", "debug", "--print-config"))
    print("rehearsed: ready for release")
    return 0


def _timed(what: str, step: Callable[[], object]) -> None:
    started = time.monotonic()
    step()
    print(f"{time.monotonic() - started:6.1f} s  {what}", flush=True)


def _build(dist: Path) -> None:
    dist.mkdir()
    for package in packages().values():
        built = build(package)
        for file in (built.wheel, built.sdist):
            shutil.copy(file, dist)


@contextmanager
def _index(dist: Path) -> Iterator[str]:
    """Serve a folder of distributions as a package index on localhost; yield its address."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(dist)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{int(server.stdout.readline())}/simple/"
            with urllib.request.urlopen(f"{address}titan-parallel/", timeout=30) as page:
                assert b".whl" in page.read()
            yield address
        finally:
            server.terminate()


# Without fallback, or the server would send uv on to an index of its own choice for every package it lacks.
_SERVER = """
import sys, wsgiref.simple_server as simple, pypiserver
app = pypiserver.app(roots=[sys.argv[1]], disable_fallback=True)
server = simple.make_server("127.0.0.1", 0, app)
print(server.server_port, flush=True)
server.serve_forever()
"""


def _install(address: str, python: Path, name: str) -> None:
    """Install a package of ours from the local index, and what it requires from the usual one."""
    constraints = python.parents[2] / "locked.txt"
    if not python.exists():
        options = "--quiet --all-packages --all-extras --no-emit-workspace --no-hashes -o"
        _run("uv", "export", *options.split(), str(constraints))
        _run("uv", "venv", "--quiet", "--python", sys.executable, str(python.parents[1]))
    # Earlier rehearsals may have left other wheels of this version in uv's cache.
    refresh = [f"--refresh-package={package}" for package in packages()]
    where = ["--python", str(python), "--index", address, "--constraint", str(constraints)]
    _run("uv", "pip", "install", "--quiet", *where, *refresh, name)


def _only(python: Path, name: str) -> None:
    """Check that no other package of ours came along."""
    shown = _run("uv", "pip", "list", "--quiet", "--python", str(python), "--format", "freeze")
    found = re.findall(r"^(titan-[\w-]+)==", shown, re.MULTILINE)
    assert found == [name], f"{name} is not installed alone: {found}"


def _first_example(python: Path, folder: Path) -> None:
    readme = (ROOT / "packages" / "titan-parallel" / "README.md").read_text("utf-8")
    match = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert match, "titan-parallel's README has no Python example"
    program = folder / "example.py"
    program.write_text(match[1])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), str(program)]
    # Two ranks that compile in one thread each take half the time on two cores of what pools of compilers take.
    print(_run(str(python), *launch, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1"), end="")


def _run(*command: str, **variables: str) -> str:
    """Run a command away from the sources and return its output; print it and exit if the command fails."""
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED_ON} | variables
    cwd = ROOT if command[:2] == ("uv", "export") else tempfile.gettempdir()
    done = subprocess.run(command, cwd=cwd, env=environment, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout, done.stderr, f"FAILED: {' '.join(command)}", sep="\n", file=sys.stderr)
        raise SystemExit(1)
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
