"""What a change touches, on lists of files and on repositories made for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import changed
from changed import Touched
from workspace import packages

SIBLINGS = {name: list(package.siblings) for name, package in packages().items()}
ALL = Touched(("titan-ckpt", "titan-data", "titan-model", "titan-parallel", "titan-train"), docs=True, commands=True)
DOCS = Touched((), docs=True, commands=False)
NOTHING = Touched((), docs=False, commands=False)

Git = Callable[..., str]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["packages/titan-data/src/titan_data/loader.py"], Touched(("titan-data", "titan-train"), True, True)),
        (["packages/titan-data/pyproject.toml"], Touched(("titan-data", "titan-train"), True, True)),
        (["packages/titan-data/tests/test_readme.py"], Touched(("titan-data",), True, True)),
        (["packages/titan-data/README.md"], Touched(("titan-data",), True, True)),
        (["packages/titan-train/README.md"], Touched(("titan-train",), True, True)),
        (["examples/titan-parallel/llama.py"], Touched(("titan-parallel",), True, True)),
        (["docs/architecture.md", "mkdocs.yml", "CONTRIBUTING.md"], DOCS),
        (["README.md"], Touched((), docs=True, commands=True)),
        (["docs/architecture.md", "packages/titan-ckpt/README.md"], Touched(("titan-ckpt",), True, True)),
        (["justfile", ".editorconfig", ".github/ISSUE_TEMPLATE/bug.yml"], NOTHING),
        ([], NOTHING),
        (["conftest.py"], ALL),
        (["pyproject.toml"], ALL),
        (["uv.lock"], ALL),
        (["tools/isolated.py"], ALL),
        ([".ci/run"], ALL),
        ([".github/workflows/ci.yml"], ALL),
        (["packages/titan-new/src/titan_new/__init__.py"], ALL),
        (["something-new"], ALL),
    ],
)
def test_files(files: list[str], expected: Touched) -> None:
    assert changed.touched(files, SIBLINGS) == expected


def test_answers_are_lines_for_github() -> None:
    lines = changed.answers(Touched(("titan-data", "titan-train"), docs=True, commands=False))
    assert lines == 'packages=["titan-data", "titan-train"]\ndocs=true\ncommands=false'
    assert changed.answers(NOTHING).startswith("packages=[]\n")


@pytest.fixture
def git(tmp_path: Path) -> Git:
    """Return git in a repository of one commit."""

    def run(*arguments: str) -> str:
        identity = ("-c", "user.email=someone@example.org", "-c", "user.name=Someone")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    run("init", "-q", "-b", "main")
    commit(run, tmp_path, "packages/titan-data/src/titan_data/loader.py")
    return run


def commit(git: Git, root: Path, file: str) -> str:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(f"This is {file}.\n" * 20)
    git("add", file)
    git("commit", "-qm", file)
    return git("rev-parse", "HEAD")


def test_first_push(git: Git, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert changed.changed_files("0" * 40, tmp_path) is None
    assert "so everything is tested" in capsys.readouterr().err
    assert changed.changed_files("", tmp_path) is None


def test_base_that_is_not_in_the_clone(git: Git, tmp_path: Path) -> None:
    assert changed.changed_files("955cef5" + "0" * 33, tmp_path) is None


def test_renamed_branch(git: Git, tmp_path: Path) -> None:
    """The name of the branch plays no part, and what main got meanwhile is not counted."""
    base = git("rev-parse", "HEAD")
    git("switch", "-qc", "work")
    commit(git, tmp_path, "docs/a.md")
    git("branch", "-m", "work", "renamed")
    assert changed.changed_files(base, tmp_path) == ["docs/a.md"]
    git("switch", "-q", "main")
    ahead = commit(git, tmp_path, "tools/b.py")
    git("switch", "-q", "renamed")
    assert changed.changed_files(ahead, tmp_path) == ["docs/a.md"]


def test_branch_without_a_common_commit(git: Git, tmp_path: Path) -> None:
    base = git("rev-parse", "HEAD")
    git("switch", "-q", "--orphan", "afresh")
    commit(git, tmp_path, "docs/a.md")
    assert changed.changed_files(base, tmp_path) is None


def test_only_documents(git: Git, tmp_path: Path) -> None:
    base = git("rev-parse", "HEAD")
    commit(git, tmp_path, "docs/architecture.md")
    files = changed.changed_files(base, tmp_path)
    assert files == ["docs/architecture.md"]
    assert changed.touched(files, SIBLINGS) == DOCS


def test_file_moved_between_packages_counts_for_both(git: Git, tmp_path: Path) -> None:
    base = git("rev-parse", "HEAD")
    old, new = "packages/titan-data/src/titan_data/loader.py", "packages/titan-ckpt/src/titan_ckpt/loader.py"
    (tmp_path / new).parent.mkdir(parents=True)
    git("mv", old, new)
    git("commit", "-qm", "moved")
    assert sorted(changed.changed_files(base, tmp_path) or []) == [new, old]
