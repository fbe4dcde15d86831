"""Documents lead where they say, and their examples are files."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import docs_pages
import examples
from workspace import ROOT, packages

RUN_HERE = sorted(name for name in examples.all_examples() if name.endswith(".py") and "titan-parallel/" not in name)
PACKAGES = sorted(packages())


def test_examples_are_those_of_the_readmes() -> None:
    assert examples.problems() == [], "run: uv run python tools/examples.py write"


def test_blocks_of_a_readme_become_files() -> None:
    readme = (
        "# titan-data\n\n## First, alone\n\n```python\na = 1\n```\n\n```console\n$ titan-data verify x\n$ ls\n```\n"
        "### Then\n```python\nb = 2\n```\n```toml\n# mine.toml\nx = 1\n```\n```toml\ny = 1\n```\n```py\nno\n```\n"
    )
    origin = "# From packages/titan-data/README.md; written by tools/examples.py.\n"
    tour = (
        f"{origin}\nimport shlex\nimport subprocess\n\n# First, alone\n\na = 1\n\n# First, alone\n\n"
        "subprocess.run(shlex.split('titan-data verify x'), check=True)\n\n# Then\n\nb = 2\n"
    )
    assert examples.examples("titan-data", readme) == {
        "titan-data/mine.toml": "# mine.toml\nx = 1\n",
        "titan-data/tour.py": tour,
    }
    apart = examples.examples("titan-parallel", readme.replace("titan-data", "titan-parallel"))
    assert set(apart) == {"titan-parallel/mine.toml", "titan-parallel/first.py", "titan-parallel/then.py"}


@pytest.mark.nightly  # the same code as the READMEs', which are run more often
@pytest.mark.parametrize("name", RUN_HERE)
def test_example_runs(name: str, tmp_path: Path) -> None:
    """Those of titan-parallel, which need torchrun, are run by its own test of the README."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_reference_has_every_exported_name(package: str) -> None:
    module = importlib.import_module(package.replace("-", "_"))
    assert sorted(docs_pages.exported(package)) == sorted(module.__all__)
    page = docs_pages.reference(package)
    assert [name for name in module.__all__ if f"\n::: {module.__name__}.{name}\n" not in page] == []


def test_links_lead_to_pages() -> None:
    readme = docs_pages.relinked(
        "[a](docs/architecture.md) [b](packages/titan-data/README.md#x)", "README.md", "index.md"
    )
    assert readme == "[a](architecture.md) [b](guides/titan-data.md#x)"
    absolute = f"[a]({docs_pages.REPOSITORY}docs/performance.md), [b]({docs_pages.REPOSITORY}tools/lock.py), [c](#here)"
    page = docs_pages.relinked(absolute, "packages/titan-model/README.md", "guides/titan-model.md")
    assert page == f"[a](../performance.md), [b]({docs_pages.REPOSITORY}tools/lock.py), [c](#here)"
    assert docs_pages.relinked("[a](https://x.org/y.md)", "README.md", "index.md") == "[a](https://x.org/y.md)"


@pytest.mark.parametrize("package", PACKAGES)
def test_links_of_a_package_hold_on_a_package_index(package: str) -> None:
    readme = (ROOT / "packages" / package / "README.md").read_text("utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", readme)
    assert [target for target in targets if "://" not in target] == []
    ours = [
        target.removeprefix(docs_pages.REPOSITORY) for target in targets if target.startswith(docs_pages.REPOSITORY)
    ]
    assert [path for path in ours if not (ROOT / path).exists()] == []


def test_packages_lead_home_and_name_their_pythons() -> None:
    for package in packages().values():
        project = tomllib.loads((package.folder / "pyproject.toml").read_text("utf-8"))["project"]
        assert {"Homepage", "Documentation", "Changelog", "Issues"} <= project["urls"].keys()
        for url in project["urls"].values():
            path = url.removeprefix(docs_pages.REPOSITORY)
            assert path == url or (ROOT / path).exists(), url
        assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= {*project["classifiers"]}


def test_uv_is_asked_for_in_one_version() -> None:
    """The range in pyproject.toml; the documented `pip install` gets one that fits."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["uv"]["required-version"]
    for document in ("README.md", "CONTRIBUTING.md"):
        asked = re.findall(r"pip install [\"']?uv([^\s\"'`]*)", (ROOT / document).read_text("utf-8"))
        assert asked, document
        assert set(asked) == {required}, document
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = workflow.read_text("utf-8")
        assert "pip install" not in text.replace("uv pip install", ""), workflow
        assert text.count("uses: astral-sh/setup-uv@") == len(re.findall(r"enable-cache: (?:true|false)\n", text)), (
            workflow
        )
