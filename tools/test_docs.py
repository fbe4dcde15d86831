"""What the documentation names exists, and the packages' public names are unambiguous."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from workspace import ROOT

PACKAGES = ("titan_model", "titan_parallel", "titan_data", "titan_ckpt", "titan_train")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])

# titan_model.decoder.build, in prose or code
_DOTTED = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
# packages/titan-model/README.md or tools/lock.py, anywhere; a path that ends in a wildcard or a placeholder is left out
_PATH = re.compile(r"(?<![\w/.-])(?:packages|tools|docs|examples|\.ci|\.github)/[\w./-]*\w(?![\w*{<…/-])")
# titan_model/decoder.py: a path inside a package's sources
_SOURCE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})/[\w./-]*\w")
_BLOB = re.compile(r"/(?:blob|tree)/main/([\w./-]*\w)")  # absolute links into the repository
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


def exists(dotted: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            if not hasattr(found, name) and name not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, name, None)
        return True
    return False


def missing(text: str, page: Path) -> list[str]:
    """Return the names, paths and links of a page's text that do not exist."""
    names = [name for name in set(_DOTTED.findall(text)) if not exists(name)]
    paths = [path for path in {*_PATH.findall(text), *_BLOB.findall(text)} if not (ROOT / path).exists()]
    for path in set(_SOURCE.findall(text)):
        package = path.partition("/")[0]
        if not (ROOT / "packages" / package.replace("_", "-") / "src" / path).exists():
            paths.append(path)
    links = [link for link in set(_LINK.findall(text)) if not (page.parent / link).exists()]
    return sorted({*names, *paths, *links})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_name_path_and_link_exists(page: Path) -> None:
    assert missing(page.read_text("utf-8"), page) == []


def test_wrong_names_paths_and_links_are_found() -> None:
    wrong = [
        "docs/elsewhere.md",
        "docs/nowhere.md",
        "nowhere/README.md",
        "titan_model.decoder.Nothing",
        "titan_model.nowhere.build",
        "titan_model/nowhere.py",
        "tools/nowhere.py",
    ]
    text = (
        "`titan_model.decoder.Nothing` `titan_model.nowhere.build` `titan_model/nowhere.py` python tools/nowhere.py, "
        "[text](nowhere/README.md) (docs/nowhere.md) "
        "[text](https://example.org/titan/blob/main/docs/elsewhere.md)"
    )
    right = "`titan_model.decoder.build` `titan_model/decoder.py` [text](tools/workspace.py) packages/*/README.md"
    assert missing(f"{text} {right}", ROOT / "README.md") == wrong


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_hides_behind_an_exported_name(name: str) -> None:
    # `import titan_x.y` would replace the exported `titan_x.y` by the module of that name.
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert sorted(modules & set(package.__all__)) == []


def test_no_name_is_exported_by_two_packages() -> None:
    exported = Counter(name for package in PACKAGES for name in set(importlib.import_module(package).__all__))
    assert sorted(name for name, count in exported.items() if count > 1 and not name.startswith("__")) == []


@pytest.mark.slow
def test_the_readme_example_trains_on_two_ranks(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    losses = [float(loss) for loss in re.findall(r"step \d+  loss (\S+)", printed)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
