"""The README's scripts run as it says, and it lists what is public."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import titan_parallel
from titan_parallel import Degrees, Float8Options, ParallelOptions, ParallelPlan
from titan_parallel.plan import TensorStyle

README = (Path(__file__).parents[1] / "README.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SAYS = [r"^loss (\d\.\d+) -> (\d\.\d+)$", r"^loss (\d\.\d+), as in one process$"]


def run(script: str, folder: Path, environment: dict[str, str]) -> str:
    path = folder / "example.py"
    path.write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(launch, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("script", "says"), list(zip(SCRIPTS, SAYS, strict=True)), ids=["regressor", "transformer"])
def test_scripts(tmp_path: Path, script: str, says: str) -> None:
    # Compiling takes most of a minute on two cores; `slow` below does that.
    out = run(script, tmp_path, {"TORCHDYNAMO_DISABLE": "1"})
    assert re.search(says, out, re.MULTILINE), out


@pytest.mark.slow
def test_script_compiled(tmp_path: Path) -> None:
    found = re.search(SAYS[0], run(SCRIPTS[0], tmp_path, {}), re.MULTILINE)
    assert found
    assert float(found[2]) < float(found[1]) / 2


def test_tables() -> None:
    cells = re.findall(r"^\| (`[^|]+) \|", README, flags=re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`([A-Za-z_0-9]+)[^`]*`", cell)]
    entries, degrees = ParallelPlan.__annotations__, Degrees.__dataclass_fields__
    options = [*ParallelOptions.__dataclass_fields__, *Float8Options.__dataclass_fields__]
    words = [*entries, *TensorStyle.__args__, *degrees, *options, *titan_parallel.__all__]
    assert sorted(listed) == sorted(words)
