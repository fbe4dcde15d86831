"""Test packages as their users install them: from built wheels, in environments of their own.

uv run python tools/isolated.py alone titan-data    only this package's wheel is installed; its tests run
uv run python tools/isolated.py alone               the same for each package that needs no sibling
uv run python tools/isolated.py floor               the lowest versions that the packages claim to work with
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from wheels import build
from workspace import ROOT, leaves, packages

TESTERS = ("pytest", "pytest-xdist", "hypothesis")

# What only these environments can show: that every module imports, every test module too, and that the code which
# reaches for other libraries late (extras, object collectives, numpy behind torch) finds what the package declares.
# Everything else is tested once, on the locked versions.
TESTS = {
    "titan-ckpt": ["test_readme.py", "test_round_trip.py", "test_ranks.py", "cli"],
    "titan-data": ["test_readme.py", "test_elastic.py", "cli", "files/test_files.py", "shards/test_shards.py"],
    "titan-model": ["test_readme.py", "test_init.py", "test_loss.py", "convert/test_huggingface_files.py"],
    "titan-parallel": ["test_readme.py", "test_one_loss.py", "context/test_layouts.py", "pipeline/test_pipeline.py"],
    "titan-train": ["test_settings.py", "test_metrics.py", "test_interfaces.py"],
}

# What a package does for a library that it does not depend on: tests that are skipped without it, slow ones too.
BESIDE = {
    "titan-ckpt": {"torchtitan==0.3.0": ["convert/test_torchtitan.py"]},
    "titan-parallel": {
        # One example: the others, and pipelines, need nothing more of the wheel.
        "transformers": ["test_transformers_plan.py", "test_readme.py::test_scripts[llama]"],
    },
}

IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
package, *others = sys.argv[1:]
assert not any(map(importlib.util.find_spec, others)), others
for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def main() -> int:
    """Run the command named on the command line."""
    match sys.argv[1:]:
        case ["alone"]:
            names = leaves()
        case ["alone", name] if name in packages():
            names = [name]
        case ["floor"]:
            return _floor()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(prefix="titan-alone-") as scratch:
        constraints = _locked_versions(Path(scratch))
        failed = [name for name in names if not _alone(name, Path(scratch), constraints)]
    print(f"alone: {', '.join(failed)} failed" if failed else f"alone: {', '.join(names)} passed")
    return 1 if failed else 0


def _alone(name: str, scratch: Path, constraints: Path) -> bool:
    print(f"--- {name}, alone", flush=True)
    python = _environment(scratch / name)
    _install(python, str(build(packages()[name]).wheel), *TESTERS, "--constraint", str(constraints))
    others = [other.replace("-", "_") for other in packages() if other != name]
    _run(str(python), "-c", IMPORT_ALL, name.replace("-", "_"), *others)
    passed = _collects(python, name) and _tests(python, [f"packages/{name}/tests/{test}" for test in TESTS[name]])
    for other, tests in BESIDE.get(name, {}).items():
        print(f"--- {name}, beside {other}", flush=True)
        _install(python, other, "--overrides", str(constraints))  # even where it would have an older version
        passed &= _tests(
            python, ["-m", "not huge and not nightly", *(f"packages/{name}/tests/{test}" for test in tests)]
        )
    return passed


def _floor() -> int:
    with tempfile.TemporaryDirectory(prefix="titan-floor-") as folder:
        scratch = Path(folder)
        pyprojects = [str(package.folder / "pyproject.toml") for package in packages().values()]
        options = "--quiet --all-extras --resolution lowest-direct --no-header --no-annotate --python-version 3.11"
        command = ["uv", "pip", "compile", *options.split(), *pyprojects]
        lowest = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        outside = [line for line in lowest.splitlines() if "titan-" not in line]
        (scratch / "floor.txt").write_text("\n".join(outside))
        direct = ("torch==", "pydantic==", "rich==", "tensorboard==", "datasets==", "typing-extensions==")
        print("--- floor:", " ".join(line for line in outside if line.startswith(direct)), flush=True)
        python = _environment(scratch / "venv")
        _install(python, "--requirement", str(scratch / "floor.txt"), *TESTERS)
        _install(python, "--no-deps", *(str(build(package).wheel) for package in packages().values()))
        passed = _tests(python, [f"packages/{name}/tests/{test}" for name, tests in TESTS.items() for test in tests])
    print("floor: passed" if passed else "floor: failed")
    return 0 if passed else 1


def _locked_versions(scratch: Path) -> Path:
    """Write the versions of the lock as constraints, so that a new release elsewhere changes nothing here."""
    file = scratch / "locked.txt"
    _run(
        "uv",
        "export",
        "--quiet",
        "--all-packages",
        "--all-extras",
        "--no-emit-workspace",
        "--no-hashes",
        "-o",
        str(file),
    )
    return file


def _environment(folder: Path) -> Path:
    _run("uv", "venv", "--quiet", "--python", sys.executable, str(folder))
    return folder / "bin" / "python"


def _install(python: Path, *what: str) -> None:
    _run("uv", "pip", "install", "--quiet", "--python", str(python), *what)


def _collects(python: Path, name: str) -> bool:
    """Import every test module, so that none asks for a library that the package does not declare."""
    return _tests(python, ["--collect-only", "-qq", "-m", "", f"packages/{name}/tests"])


def _tests(python: Path, tests: list[str]) -> bool:
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    # The environment's own programs (torchrun) come first, as if it were activated.
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    # It is thrown away: bytecode may be stored in it, or each of the tests' processes compiles all of torch's Python.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def _run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    raise SystemExit(main())
