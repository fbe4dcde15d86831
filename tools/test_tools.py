"""The maintainers' tools, on made-up workspaces."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import check_run
import lock
import readme_commands
import release
from workspace import ROOT, Package, leaves, packages

ADDRESSED = """\
version = 1

[[package]]
name = "a"
source = { registry = "https://index.example/simple" }
sdist = { url = "https://files.example/aa/bb/a-1.0.tar.gz", hash = "sha256:00", size = 3 }
wheels = [
    { url = "https://files.example/cc/a-1.0-py3-none-any.whl", hash = "sha256:11", size = 4 },
]

[[package]]
name = "root"
version = "0.0.0"
source = { virtual = "." }
dependencies = [
    { name = "a" },
]

[package.metadata]
requires-dist = [{ name = "a" }]

[package.metadata.requires-dev]
dev = [{ name = "a" }]

[[package]]
name = "member"
source = { editable = "packages/member" }

[package.metadata]
requires-dist = [{ name = "a" }]
"""


def test_neutral_lock_has_no_address_and_keeps_the_rest() -> None:
    neutral = lock.neutralize(ADDRESSED)
    assert lock.violations(ADDRESSED)
    assert lock.violations(neutral) == []
    assert "://" not in neutral
    assert 'source = { registry = "registry" }' in neutral
    assert '{ path = "a-1.0-py3-none-any.whl", hash = "sha256:11", size = 4 }' in neutral
    assert neutral.count("[package.metadata]") == 1  # the member's stays, the root's goes
    assert "requires-dev" not in neutral
    assert lock.neutralize(neutral) == neutral


def test_lock_filter_keeps_addresses_out_of_git(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("config", "user.email", "someone@example.org")
    git("config", "user.name", "Someone")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/lock.py").write_text((ROOT / "tools/lock.py").read_text())
    (tmp_path / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    (tmp_path / "uv.lock").write_text(ADDRESSED)
    python = ["python3", "tools/lock.py"]
    git("add", "uv.lock", ".gitattributes")
    git("commit", "-qm", "without the filter")
    assert subprocess.run([*python, "check"], cwd=tmp_path, check=False, capture_output=True).returncode == 1
    subprocess.run([*python, "register"], cwd=tmp_path, check=True, capture_output=True)
    git("add", "--renormalize", "uv.lock")
    git("commit", "-qm", "with it")
    assert git("show", "HEAD:uv.lock") == lock.neutralize(ADDRESSED)
    assert (tmp_path / "uv.lock").read_text() == ADDRESSED
    assert git("status", "--porcelain") == "?? tools/\n"
    assert subprocess.run([*python, "check"], cwd=tmp_path, check=False, capture_output=True).returncode == 0


def test_readme_commands_are_those_of_console_blocks() -> None:
    text = "```console\n$ one  # why\nits output\n$ two --x\n```\n```sh\n$ not this\n```\n"
    assert readme_commands.commands(text) == ["one", "two --x"]


def test_readme_names_the_main_job_and_the_tests() -> None:
    found = readme_commands.commands((ROOT / "README.md").read_text())
    assert "uv run titan-train --config debug" in found
    assert "uv run pytest" in found


def write_run(folder: Path, losses: list[float]) -> Path:
    for name in ("tensorboard", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").touch()
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_check_run_sees_what_was_not_learned(tmp_path: Path) -> None:
    assert any("metrics.jsonl: missing" in problem for problem in check_run.problems(tmp_path / "none"))
    assert check_run.problems(write_run(tmp_path, [5.6] + [2.2] * 9)) == []
    assert "less than 2.3" in check_run.problems(write_run(tmp_path, [5.6] + [2.4] * 9))[0]
    assert "about ln" in check_run.problems(write_run(tmp_path, [4.0] + [2.0] * 9))[0]
    assert check_run.problems(write_run(tmp_path, [5.6] + [float("nan")] * 9))


def test_check_run_compares_layouts(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [5.6, 4.0, 3.0, 2.5, 2.2])
    assert check_run.deviations(write_run(tmp_path / "two", [5.6, 4.0001, 2.9999]), one) == []
    assert "step 3 is 3.1000" in check_run.deviations(write_run(tmp_path / "two", [5.6, 4.0, 3.1]), one)[0]
    assert check_run.deviations(write_run(tmp_path / "two", [5.6, float("nan"), 3.0]), one)
    assert "only 2 steps" in check_run.deviations(write_run(tmp_path / "two", [5.6, 4.0]), one)[0]


def test_four_leaves_and_one_driver() -> None:
    known = packages()
    assert leaves() == ["titan-ckpt", "titan-data", "titan-model", "titan-parallel"]
    assert set(known["titan-train"].siblings) == set(leaves())


def test_every_package_can_be_released() -> None:
    known = packages()
    assert [problem for package in known.values() for problem in release.problems(package, known)] == []


def test_release_refuses_what_does_not_fit() -> None:
    known = packages()
    data = known["titan-data"]
    assert release.package_of(f"titan-data-v{data.version}", known) is data
    with pytest.raises(ValueError, match="does not name a package"):
        release.package_of("data-v1", known)
    with pytest.raises(ValueError, match=r"is at 0\.1\.0"):
        release.package_of("titan-data-v9.9.9", known)
    train = known["titan-train"]
    off = Package(train.name, "7.0.0", {"titan-data": ">=3", "titan-model": ""}, train.folder)
    said = "\n".join(release.problems(off, known))
    assert "no text under '## [7.0.0]'" in said
    assert "requires titan-data>=3, but it is 0.1.0 here" in said
    assert "requires titan-model without bounds" in said
